"""Figures 8b and 9: plot throughput by scale and time over tau, from a benchmark's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogFormatter

from dmoe_var.figures.fid_over_flops import finish
from dmoe_var.figures.style import SHADED_MARKERS, Paths, colour, save, styled, subplots

Bars = Mapping[str, Any]
"""Keys: name, method, shade, images_per_s (one value per scale)."""
Times = Mapping[str, Any]
"""Keys: name, method, shade, dense, rows. Dense and each row hold ms_median, ms_p10 and ms_p90; a
row also holds tau."""


@styled
def draw_throughput(bars: Sequence[Bars], title: str, note: str, paths: Paths) -> None:
    """Plot one group of bars per scale, one bar per model."""
    figure, axis = subplots(figsize=(5.6, 3.4))
    width = 0.8 / len(bars)
    for i, each in enumerate(bars):
        places = np.arange(len(each["images_per_s"])) + (i - (len(bars) - 1) / 2) * width
        axis.bar(
            places, each["images_per_s"], width, label=each["name"], edgecolor="white",
            color=colour(each["method"], each["shade"]),
        )  # fmt: skip
    num_scales = len(bars[0]["images_per_s"])
    axis.set_xticks(range(num_scales), [str(si + 1) for si in range(num_scales)])
    axis.set_yscale("log")
    for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatter(LogFormatter(labelOnlyBase=False))
    finish(axis, "scale (1 the coarsest)", "images a second through the scale", title, note)
    save(figure, paths)


@styled
def draw_over_tau(curves: Sequence[Times], title: str, note: str, paths: Paths) -> None:
    """Plot a batch's time over tau, relative to the dense model's in the same run; p10 to p90."""
    figure, axis = subplots(figsize=(5.4, 3.6))
    times_ms = [curve["dense"]["ms_median"] for curve in curves]
    dense = f"dense VAR ({min(times_ms):.0f} to {max(times_ms):.0f} ms)"
    axis.axhline(1, color=colour("dense", None), linestyle="--", label=dense)
    for i, curve in enumerate(curves):
        rows = sorted(curve["rows"], key=lambda row: row["tau"])
        p10, median, p90 = (
            np.array([row[key] for row in rows]) / curve["dense"]["ms_median"]
            for key in ("ms_p10", "ms_median", "ms_p90")
        )
        axis.errorbar(
            [row["tau"] for row in rows], median, yerr=[median - p10, p90 - median],
            label=curve["name"], color=colour(curve["method"], curve["shade"]),
            marker=SHADED_MARKERS[i % len(SHADED_MARKERS)], markersize=4, capsize=2, linewidth=1.2,
        )  # fmt: skip
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
    finish(axis, "tau (Eq. 3)", "time of a batch / dense VAR's", title, note)
    save(figure, paths)
