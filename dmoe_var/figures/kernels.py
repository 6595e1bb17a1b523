"""Plot the time of expert paths over density, beside the dense FFN; one panel per expert size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmoe_var.figures.style import save, styled, subplots

COLOURS = {
    "reference": "#7F7F7F",
    "grouped": "#E69F00",
    "native": "#D55E00",
    "triton": "#0072B2",
    "layer": "#009E73",
}
COLUMNS = 4
RANDOM, NO_ZEROS = "random", "no_zeros"
"""What `masks` of a row says of layers that are no model's own: random masks; every expert, and no
hidden value that is 0."""


@styled
def draw_kernels(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot time relative to the fastest dense FFN over density, beside the density itself and the
    device's limit. Each panel shows the scale with the most tokens. Lines join random weights and
    masks, a ring is of weights that leave no hidden zero to skip, a star a model's own layers."""
    shown = [row for row in rows if row["density"] is not None]
    sizes = sorted({(row["model"], row["width"], row["expert_size"]) for row in shown})
    columns = min(COLUMNS, len(sizes))
    count = -(-len(sizes) // columns)
    figure, axes = subplots(
        count, columns, figsize=(2.6 * columns, 2.6 * count), squeeze=False, sharey=True
    )
    figure.subplots_adjust(hspace=0.6)  # keeps a row's titles below the x labels of the row above
    for axis, (model, width, size) in zip(axes.flat[: len(sizes)], sizes, strict=True):
        of_size = [r for r in shown if (r["model"], r["expert_size"]) == (model, size)]
        # The largest scale
        tokens = max(row["tokens"] for row in of_size)
        of_size = sorted(
            (row for row in of_size if row["tokens"] == tokens), key=lambda row: row["density"]
        )
        random = [row for row in of_size if row["masks"] == RANDOM]
        full = [row for row in of_size if row["masks"] == NO_ZEROS]
        own = [row for row in of_size if row["masks"] not in (RANDOM, NO_ZEROS)]
        # A line per path, and for the layer with its router by the fastest one
        for impl, colour in COLOURS.items():
            if impl in {row["impl"] for row in random}:  # not every path runs on every device
                axis.plot(
                    *_points(random, impl, "time_ratio"), "o-", color=colour, markersize=3,
                    linewidth=1, label=impl,
                )  # fmt: skip
                axis.plot(*_points(own, impl, "time_ratio"), "*", color=colour, markersize=7)
                axis.plot(
                    *_points(full, impl, "time_ratio"), "o", color=colour, markerfacecolor="none",
                    markersize=5,
                )  # fmt: skip
        # Limits and labels
        limits = _points(random, "reference", "limit_ratio")
        axis.plot(*limits, ":", color="black", linewidth=1, label="the device's limit")
        axis.axline((0, 0), slope=1, color="#B0B0B0", linewidth=0.8, zorder=0)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, 1.05)
        axis.set_ylim(0, 2)
        axis.set_title(f"{model}, C {width}\nexperts of {size}, {tokens} tokens", fontsize=7)
        axis.set_xlabel("density")
    for axis in axes.flat[len(sizes) :]:
        axis.set_visible(False)
    axes[0, 0].set_ylabel("time / fastest dense FFN")
    axes[0, 0].legend(fontsize=6)
    save(figure, path)


def _points(
    rows: Sequence[Mapping[str, Any]], impl: str, key: str
) -> tuple[list[float], list[float]]:
    """List the densities of a path's rows, and a value of each."""
    of_path = [row for row in rows if row["impl"] == impl]
    return [row["density"] for row in of_path], [row[key] for row in of_path]
