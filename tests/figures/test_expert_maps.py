"""Figures 2b and 12: pictures after each sparse scale and their experts."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_var.figures import expert_maps
from dmoe_var.figures.expert_maps import ExpertMaps, draw


@pytest.mark.parametrize(("num_images", "num_taus", "scales"), [(1, 1, [3]), (2, 3, [4, 5, 6])])
def test_draw(opened, tmp_path, num_images, num_taus, scales):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (num_images, len(scales), 8, 8, 3), dtype=np.uint8)
    maps = ExpertMaps(images, rng.random((num_images, len(scales), 4, 4)))
    path = tmp_path / "maps.png"
    draw({f"tau {i}": maps for i in range(num_taus)}, scales, path)
    width, height = opened(path).size
    columns, rows = num_taus * len(scales), 2 * num_images
    assert 80 * columns < width < 250 * columns + 200
    assert 80 * rows < height < 250 * rows + 200


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
