"""Figure 2a: dense images beside dynamic ones from the same seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmoe_var.figures.style import plt, save


def tile(images_NRR3: np.ndarray, columns: int) -> np.ndarray:
    """Images in rows of `columns`, one white pixel between them; uint8 (height, width, 3)."""
    num, side = images_NRR3.shape[:2]
    rows = -(-num // columns)
    canvas = np.full((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images_NRR3):
        y, x = (i // columns) * (side + 1), (i % columns) * (side + 1)
        canvas[y : y + side, x : x + side] = image
    return canvas


def draw(panels: dict[str, np.ndarray], columns: int, path: Path) -> None:
    """Draw one grid a panel, side by side; panels: title -> uint8 (N, R, R, 3)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.4), squeeze=False)
    for axis, (title, images) in zip(axes[0], panels.items(), strict=True):
        axis.imshow(tile(images, columns), interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    save(figure, path)
