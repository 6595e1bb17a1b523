"""Plot FID over FLOPs for the curves of figures and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dmoe_var.figures.style import MARKERS, SHADED_MARKERS, Paths, colour, save, styled, subplots

FLOPS = "transformer GMAC an image (guidance included, decoder left out)"
SIZES = {"dense": 11, "chosen": 10}
MANY_LINES = 6
"""Lines in one plot above which only the ends of a line are labelled."""

Curve = Mapping[str, Any]
"""Keys: name, method (for the colour), shade (None, or 0..1 among curves of a kind), line (false:
points alone), rows with label, fid_mean, fid_std and the x axis, by default flops_gmac."""


def display_name(metric: str) -> str:
    """Write a metric such as `fid_efflite0_64px` for people; only InceptionV3's is plain FID."""
    size = metric.removeprefix("fid_efflite0_").removesuffix("px")
    return "FID" if metric == "fid" else f"FID-EffLite0 ({size} px)"


@styled
def draw(curves: Sequence[Curve], fid_name: str, title: str, note: str, paths: Paths) -> None:
    """Plot curves with the standard deviation over seeds as error bars; `note` goes below."""
    figure, axis = subplots(figsize=(5.4, 3.8))
    plot(axis, curves)
    finish(axis, FLOPS, display_name(fid_name), title, note)
    save(figure, paths)


@styled
def draw_accounting(
    curves: Sequence[Curve], fid_name: str, title: str, note: str, paths: Paths
) -> None:
    """Plot the same points over FLOPs as counted, and over FLOPs by the authors' accounting."""
    authors = "transformer GMAC an image by the authors' accounting"
    _draw_beside(curves, {"flops_gmac_authors": authors}, fid_name, title, note, paths)


@styled
def draw_over_time(
    curves: Sequence[Curve], fid_name: str, title: str, note: str, paths: Paths
) -> None:
    """Plot the same points over FLOPs, and over the time that their images took."""
    time = "sampling, ms an image (decoder included)"
    _draw_beside(curves, {"sampling_ms_per_image": time}, fid_name, title, note, paths)


def _draw_beside(
    curves: Sequence[Curve],
    other: Mapping[str, str],
    fid_name: str,
    title: str,
    note: str,
    paths: Paths,
) -> None:
    """Plot FID over FLOPs and, beside it, over another number by its label."""
    figure, axes = subplots(1, 2, figsize=(9.6, 3.8), sharey=True)
    for axis, (x, label) in zip(axes, {"flops_gmac": FLOPS, **other}.items(), strict=True):
        plot(axis, curves, x)
        finish(axis, label, display_name(fid_name), "", note, legend=False)
    of_curves = axes[0].get_legend_handles_labels()
    figure.legend(*of_curves, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4, fontsize=7)
    figure.suptitle(title, fontsize=9)
    save(figure, paths)


def plot(axis: Axes, curves: Sequence[Curve], x: str = "flops_gmac") -> None:
    """Plot mean FID over `x`, error bars over seeds; several points of a curve carry their labels,
    the first and the last alone where there are many lines. A line follows FLOPs, over time too."""
    crowded = sum(curve["line"] for curve in curves) > MANY_LINES
    shaded = 0
    for curve in curves:
        method, shade = curve["method"], curve["shade"]
        rows = sorted(curve["rows"], key=lambda row: float(row["flops_gmac"]))
        across = np.array([row[x] for row in rows])
        fid = np.array([row["fid_mean"] for row in rows])
        spread = np.array([row["fid_std"] for row in rows])
        marker = MARKERS[method]
        if shade is not None and curve["line"]:
            marker = SHADED_MARKERS[shaded % len(SHADED_MARKERS)]
            shaded += 1
        drawn = colour(method, shade)
        chosen = method == "chosen"
        axis.errorbar(
            across, fid, yerr=spread, label=curve["name"], color=drawn, marker=marker,
            linestyle="-" if curve["line"] else "none", markersize=SIZES.get(method, 4),
            markeredgewidth=2 if chosen else 1, capsize=2, linewidth=1.2, elinewidth=0.7,
            zorder=5 if chosen else 3,
        )  # fmt: skip
        labelled = rows if curve["line"] or len(rows) > 1 else []
        for row in labelled[:: max(1, len(rows) - 1)] if crowded and curve["line"] else labelled:
            axis.annotate(
                row["label"], (row[x], row["fid_mean"]), xytext=(3, 4),
                textcoords="offset points", fontsize=6, color=drawn,
            )  # fmt: skip


def finish(axis: Axes, x: str, y: str, title: str, note: str = "", *, legend: bool = True) -> None:
    """Add axis labels, title, legend, and a note below the figure."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=9)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    if note:
        axis.annotate(
            note, (0.5, 0), xytext=(0, -34), xycoords="axes fraction", ha="center", va="top",
            textcoords="offset points", fontsize=6.5, color="#555555",
        )  # fmt: skip
