"""One look for all figures: one colour per method, legible without colour vision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dmoe_var.files import whole_file
from dmoe_var.moe.selection import RULES

METHODS = {
    **{rule.name: (rule.colour, rule.marker) for rule in RULES.values()},
    "dense": ("#000000", "*"),
    "last": ("#0072B2", "o"),
    "all": ("#E69F00", "s"),
    "lists": ("#009E73", "^"),
    "chosen": ("#D55E00", "x"),
    "pruned": ("#CC79A7", "v"),
    "calibrated": ("#D55E00", "d"),
    "by_layer": ("#8C6D00", "P"),
    "drafted": ("#009E73", "D"),
    "search": ("#CC79A7", "v"),
    "linear": ("#009E73", "^"),
    "fixed": ("#0072B2", "o"),
    "guidance ends": ("#E69F00", "s"),
    "means of skipped experts": ("#56B4E9", "P"),
    "tokens skipped": ("#CC79A7", "v"),
    "heads left out": ("#777777", "D"),
    "routers told scale and class": ("#8C6D00", "^"),
    "tau in the loss": ("#009E73", "X"),
}
"""Colour and marker of each method: Okabe-Ito's palette and some dark tones; `last` and `fixed` are
one method."""
COLOURS = {method: colour for method, (colour, _) in METHODS.items()}
MARKERS = {method: marker for method, (_, marker) in METHODS.items()}
SHADED_MARKERS = "osD^vP*X"
"""Markers, beside the shade, for curves that differ by a number (scale, width, alpha, depth)."""

DPI = 150
styled = rc_context(
    {
        "figure.dpi": DPI,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "pdf.fonttype": 42,
    }
)
"""Decorates functions that plot a figure; a notebook's own style stays what it is."""


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of that many inches, whatever backend shows figures on a screen."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any
) -> Any:
    """Make a new figure and its axes."""
    figure = new_figure(*figsize)
    return figure, figure.subplots(rows, columns, **options)


def colour(method: str, shade: float | None = None) -> str:
    """Return a method's colour or, for a shade 0..1, one of cividis, which is even in grey."""
    if shade is None:
        return COLOURS[method]
    return to_hex(colormaps["cividis"](0.9 * shade))


Paths = Path | Sequence[Path]
"""One file, or several for one figure (PNG and PDF)."""


def save(figure: Figure, paths: Paths) -> None:
    """Write each file whole or not at all, as PNG or PDF by its ending."""
    for path in (paths,) if isinstance(paths, Path) else paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.removeprefix(".")
        metadata = {"Software": None} if kind == "png" else {"CreationDate": None}
        with whole_file(path) as temporary:
            figure.savefig(temporary, format=kind, bbox_inches="tight", metadata=metadata)
