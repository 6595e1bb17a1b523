"""Figures 2b and 12: pictures after each sparse scale and their experts."""

from __future__ import annotations

import numpy as np
import pytest

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
