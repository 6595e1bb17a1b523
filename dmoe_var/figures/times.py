"""Figures 8b and 9: throughput by scale, and time over tau, from the rows of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmoe_var.figures.fid_over_flops import finish
from dmoe_var.figures.style import SHADED_MARKERS, Paths, colour, plt, save

Bars = Mapping[str, Any]
"""name, method, shade, images_per_s: one value a scale."""
Times = Mapping[str, Any]
"""name, method, shade, rows: tau, ms_median, ms_p10, ms_p90 (tau None: a level, no curve)."""


def draw_throughput(bars: Sequence[Bars], title: str, note: str, paths: Paths) -> None:
    """A group of bars a scale, a bar a model."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
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
    finish(axis, "scale (1 the coarsest)", "images a second through the scale", title, note)
    save(figure, paths)


def draw_over_tau(
    curves: Sequence[Times], device: str, title: str, note: str, paths: Paths
) -> None:
    """Median time of a batch over tau, p10 to p90 as bars; the dense model as a level."""
    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    for i, curve in enumerate(curves):
        drawn = colour(curve["method"], curve["shade"])
        rows = [row for row in curve["rows"] if row["tau"] is not None]
        if not rows:
            level = curve["rows"][0]
            axis.axhline(level["ms_median"], color=drawn, linestyle="--", label=curve["name"])
            axis.axhspan(level["ms_p10"], level["ms_p90"], color=drawn, alpha=0.1, linewidth=0)
            continue
        rows.sort(key=lambda row: row["tau"])
        median = np.array([row["ms_median"] for row in rows])
        below = median - [row["ms_p10"] for row in rows]
        above = [row["ms_p90"] for row in rows] - median
        axis.errorbar(
            [row["tau"] for row in rows], median, yerr=[below, above], label=curve["name"],
            color=drawn, marker=SHADED_MARKERS[i % len(SHADED_MARKERS)], markersize=4,
            capsize=2, linewidth=1.2,
        )  # fmt: skip
    axis.set_ylim(bottom=0)
    finish(axis, "tau (Eq. 3)", f"{device} time of a batch, ms", title, note)
    save(figure, paths)
