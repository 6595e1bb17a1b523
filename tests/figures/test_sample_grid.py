"""Figure 2a: pictures in rows."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_var.figures.sample_grid import draw, tile


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 255, (7, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("columns", [1, 3, 7, 9])
def test_tile(images, columns):
    """Against a naive one: white around every picture, then the outer border off."""
    blank = np.full_like(images[0], 255)
    padded = [*images, *[blank] * (-len(images) % columns)]
    framed = [np.pad(i, ((0, 1), (0, 1), (0, 0)), constant_values=255) for i in padded]
    rows = [np.hstack(framed[i : i + columns]) for i in range(0, len(framed), columns)]
    assert np.array_equal(tile(images, columns), np.vstack(rows)[:-1, :-1])


@pytest.mark.parametrize("panels", [1, 2])
def test_draw(images, opened, tmp_path, panels):
    path = tmp_path / "new folder" / "grid.png"
    draw({f"panel {i}": images for i in range(panels)}, 3, path)
    width, height = opened(path).size
    assert 300 * panels < width < 800 * panels
    assert 300 < height < 800
