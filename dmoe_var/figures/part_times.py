"""Plot where the time of a batch goes: one stacked bar per sampler, one colour per part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import Rectangle

from dmoe_var.figures.style import save, styled, subplots

PART_COLOURS = {
    "attention": "#0072B2",
    "ffn": "#E69F00",
    "experts": "#D55E00",
    "router": "#009E73",
    "selection": "#CC79A7",
    "transformer": "#56B4E9",
    "head": "#8C6D00",
    "embedding": "#B0B0B0",
    "sampling": "#7F7F7F",
    "quantiser": "#4D4D4D",
    "decoder": "#000000",
    "rest": "#DDDDDD",
}
"""Colours by part of `metrics.part_timing`, from the palette of the methods."""


@styled
def draw_part_times(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot milliseconds per image by part, for those rows of a benchmark that have `by_part_ms`."""
    shown = [row for row in rows if "by_part_ms" in row]
    figure, axis = subplots(figsize=(6.4, 0.9 + 0.32 * len(shown)))
    for i, row in enumerate(shown):
        left = 0.0
        for part, colour in PART_COLOURS.items():
            width = row["by_part_ms"].get(part, 0.0) / row["batch_size"]
            axis.barh(i, width, left=left, color=colour, edgecolor="white", linewidth=0.3)
            left += width
    present = [p for p in PART_COLOURS if any(p in row["by_part_ms"] for row in shown)]
    handles = [Rectangle((0, 0), 1, 1, color=PART_COLOURS[part]) for part in present]
    axis.legend(handles, present, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    axis.set_yticks(
        range(len(shown)), [f"{row['name']}, batch {row['batch_size']}" for row in shown]
    )
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"ms an image ({shown[0]['device'].upper()}, {shown[0]['dtype']}), by part")
    save(figure, path)
