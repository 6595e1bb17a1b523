"""Figures 2b and 12: pictures after each sparse scale and their experts."""

from __future__ import annotations

import numpy as np

from dmoe_var.figures import expert_maps
from dmoe_var.figures.expert_maps import ExpertMaps, draw


def test_draw(opened, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (1, 1, 8, 8, 3), dtype=np.uint8)
    maps = ExpertMaps(images, rng.random((1, 1, 4, 4)))
    draw({"tau 0": maps, "tau 1": maps}, [3], tmp_path / "maps.png")
    width, height = opened(tmp_path / "maps.png").size
    assert 160 < width < 700
    assert 160 < height < 700


def test_every_map_is_under_its_picture_and_darker_where_fewer_experts_ran(unsaved):
    """A column a tau and scale; every shade stands for the same share in all maps."""
    rng = np.random.default_rng(0)
    by_tau = {
        name: ExpertMaps(
            rng.integers(0, 255, (2, 3, 8, 8, 3), dtype=np.uint8),
            0.1 + 0.5 * rng.random((2, 3, 4, 4)),
        )
        for name in ("a", "b")
    }
    figure = unsaved(expert_maps, draw, by_tau, [4, 5, 6])
    axes = np.array(figure.axes[:24]).reshape(4, 6)
    for column, (name, s) in enumerate((name, s) for name in by_tau for s in range(3)):
        assert axes[0, column].get_title() == f"{name}\nscale {s + 5}"
        for i in range(2):
            (picture,), (shown,) = axes[2 * i, column].images, axes[2 * i + 1, column].images
            assert np.array_equal(picture.get_array(), by_tau[name].images[i, s])
            shares = by_tau[name].maps[i, s]
            shades = shown.to_rgba(shares)[..., :3]
            assert np.allclose(shades, shares[..., None], atol=1 / 255)
