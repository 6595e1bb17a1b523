"""Figure 2a: plot dense images beside dynamic ones from the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes

from dmoe_var.figures.style import DPI, Paths, new_figure, save, styled

SMALLEST, LARGEST = 0.7, 1.7
"""Least and most side of a picture, in inches."""
MOST = 20
"""Most width and height of a panel, in inches."""
GAP = 0.2
"""Space between panels, in inches."""
LETTERS = 12
"""Letters of a title per inch: longer ones are broken, lest they meet the next panel's."""


def tile(images_NRR3: np.ndarray, columns: int) -> np.ndarray:
    """Tile images in rows of `columns`, one white pixel apart; uint8 (height, width, 3)."""
    num, side = images_NRR3.shape[:2]
    rows = -(-num // columns)
    canvas = np.full((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images_NRR3):
        y, x = (i // columns) * (side + 1), (i % columns) * (side + 1)
        canvas[y : y + side, x : x + side] = image
    return canvas


@styled
def draw(
    panels: dict[str, np.ndarray],
    columns: int,
    paths: Paths,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> None:
    """Plot one grid per panel, side by side; panels: title -> uint8 (N, R, R, 3).

    Rows are named beside the first panel, columns above each. Small pictures are enlarged. Others
    keep their pixels up to LARGEST inches per picture and MOST inches per panel.
    """
    num, side = next(iter(panels.values())).shape[:2]
    rows = -(-num // columns)
    inches = min(max(side / DPI, SMALLEST), LARGEST)
    inches = min(inches, MOST / max(rows, columns))
    width, height = inches * columns, inches * rows
    whole = width * len(panels) + GAP * (len(panels) - 1)
    figure = new_figure(whole, height)  # titles and names lie outside, see `save`
    for i, (title, images) in enumerate(panels.items()):
        axis = figure.add_axes((i * (width + GAP) / whole, 0, width / whole, 1))
        axis.imshow(tile(images, columns), interpolation="nearest")
        axis.set_title(fill(title, max(1, int(LETTERS * width))), fontsize=9)
        _name_cells(axis, side, row_names if i == 0 else (), column_names)
    save(figure, paths)


def _name_cells(
    axis: Axes, side: int, row_names: Sequence[str], column_names: Sequence[str]
) -> None:
    """Write names at the middle of each row and column, and hide all lines."""
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=8, top=False, labeltop=True, labelbottom=False)
    for set_ticks, names in ((axis.set_xticks, column_names), (axis.set_yticks, row_names)):
        set_ticks([i * (side + 1) + (side - 1) / 2 for i in range(len(names))], names)
