"""Figure 2a: pictures in rows."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from dmoe_var.figures import sample_grid
from dmoe_var.figures.sample_grid import draw, tile
from dmoe_var.figures.style import DPI


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


def test_draw(images, opened, tmp_path):
    path = tmp_path / "new folder" / "grid.png"
    draw({"panel 0": images, "panel 1": images}, 3, path)
    width, height = opened(path).size
    assert 500 < width < 800
    assert 250 < height < 450


def test_large_pictures_keep_their_pixels(unsaved):
    pictures = {"panel": np.zeros((4, 200, 200, 3), np.uint8)}
    figure = unsaved(sample_grid, draw, pictures, 4)
    assert figure.get_size_inches() * DPI == pytest.approx([800, 200])


def test_names_stand_by_their_pictures(images, unsaved):
    """Column names at the middle of every panel's columns, row names beside the first panel."""
    names = {"row_names": ["x", "y"], "column_names": ["p", "", "q"]}
    panels = {"a": images[:6], "b": images[:6]}
    first, second = unsaved(sample_grid, partial(draw, **names), panels, 3).axes
    assert [axis.get_title() for axis in (first, second)] == ["a", "b"]
    for axis in (first, second):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["p", "", "q"]
        assert axis.get_xticks().tolist() == [1.5, 6.5, 11.5]  # of 4 pixels each, one between
    assert [label.get_text() for label in first.get_yticklabels()] == ["x", "y"]
    assert first.get_yticks().tolist() == [1.5, 6.5]
    assert len(second.get_yticks()) == 0


def test_titles_do_not_meet(images, unsaved):
    """A long title is broken at the width of its narrow panel."""
    titles = [f"DMoE-VAR, tau 0.0938, 0.1016, 0.{end}" for end in (1088, 1099)]
    figure = unsaved(sample_grid, draw, dict.fromkeys(titles, images[:2]), 2)
    figure.draw_without_rendering()
    first, second = (axis.title.get_window_extent() for axis in figure.axes)
    assert first.x1 < second.x0
    assert [" ".join(axis.get_title().split()) for axis in figure.axes] == titles
