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
    assert 250 * panels < width < 400 * panels
    assert 250 < height < 450


def test_large_pictures_keep_their_pixels(opened, tmp_path):
    shades = np.arange(4 * 200 * 200 * 3, dtype=np.uint32).reshape(4, 200, 200, 3) % 251
    draw({"panel": shades.astype(np.uint8)}, 4, tmp_path / "grid.png")
    assert 790 < opened(tmp_path / "grid.png").size[0] < 900


def test_names_stand_by_their_pictures(images, monkeypatch, tmp_path):
    """Column names at the middle of every panel's columns, row names beside the first panel."""
    drawn = []
    monkeypatch.setattr(
        "dmoe_var.figures.sample_grid.save", lambda figure, path: drawn.append(figure)
    )
    draw({"a": images[:6], "b": images[:6]}, 3, tmp_path, ["x", "y"], ["p", "", "q"])
    first, second = drawn[0].axes
    assert [axis.get_title() for axis in (first, second)] == ["a", "b"]
    for axis in (first, second):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["p", "", "q"]
        assert axis.get_xticks().tolist() == [1.5, 6.5, 11.5]  # of 4 pixels each, one between
    assert [label.get_text() for label in first.get_yticklabels()] == ["x", "y"]
    assert first.get_yticks().tolist() == [1.5, 6.5]
    assert len(second.get_yticks()) == 0
