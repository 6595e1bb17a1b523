"""One look for all figures: a colour a method everywhere, legible without colour vision."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLOURS = {
    "dense": "#000000",
    "last": "#0072B2",
    "all": "#E69F00",
    "lists": "#009E73",
    "chosen": "#D55E00",
}
"""From the Okabe-Ito palette."""
MARKERS = {"dense": "*", "last": "o", "all": "s", "lists": "^", "chosen": "x"}

plt.rcParams.update(
    {
        "figure.dpi": 150,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    os.replace(temporary, path)
