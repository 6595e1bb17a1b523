"""Figures 6 and 10a: plot losses over steps, one curve per run, from lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from dmoe_var.figures import fid_over_flops
from dmoe_var.figures.style import SHADED_MARKERS, Paths, colour, save, styled, subplots

LoggedRun = Mapping[str, Any]
"""Keys: name, shade (0..1), and for each panel's key a list of [step, value]."""


@dataclass(frozen=True)
class Panel:
    """Describes a loss: its key in a run, and the label and scale of the y axis."""

    key: str
    label: str
    log: bool = False


def plot(axis: Axes, runs: Sequence[LoggedRun], panel: Panel) -> None:
    """Plot the curves of one panel."""
    for i, run in enumerate(runs):
        steps, values = zip(*run[panel.key], strict=True)
        marker = SHADED_MARKERS[i % len(SHADED_MARKERS)]
        axis.plot(
            steps, values, label=run["name"], color=colour("last", run["shade"]), marker=marker,
            markersize=3, markevery=max(1, len(steps) // 6), linewidth=1.2,
        )  # fmt: skip
    if panel.log:
        axis.set_yscale("log")
    fid_over_flops.finish(axis, "optimiser step", panel.label, "")


@styled
def draw(data: Mapping[str, Any], panels: Sequence[Panel], title: str, paths: Paths) -> None:
    """Plot one panel per loss, and one for the FID of the runs' models: over FLOPs or, if all
    experts ran, over the number in which the runs differ."""
    runs, curves = data["runs"], data["curves"]
    figure, axes = subplots(1, len(panels) + 1, figsize=(4.2 * (len(panels) + 1), 3.6))
    for axis, panel in zip(axes[:-1], panels, strict=True):
        plot(axis, runs, panel)
    last, fid_name = axes[-1], fid_over_flops.display_name(data["fid"])
    if all(curve["line"] for curve in curves[1:]) and len(curves) > 2:
        fid_over_flops.plot(last, curves)
        fid_over_flops.finish(last, "transformer GMAC an image", fid_name, "")
    else:
        _levels(last, *curves)
        fid_over_flops.finish(last, "alpha", fid_name, "")
    figure.suptitle(title, fontsize=9)
    figure.text(0.5, -0.03, data["note"], ha="center", fontsize=6.5, color="#555555")
    figure.tight_layout()
    save(figure, paths)


def _levels(axis: Axes, dense: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    """Plot the FID of each run's model, in the order of its rows, beside the dense model's."""
    rows = tuned["rows"]
    axis.errorbar(
        range(len(rows)), [row["fid_mean"] for row in rows], [row["fid_std"] for row in rows],
        color=colour(tuned["method"]), marker="o", markersize=4, capsize=2, label=tuned["name"],
    )  # fmt: skip
    (level,) = dense["rows"]
    axis.axhline(level["fid_mean"], color=colour("dense"), linestyle="--", label=dense["name"])
    low, high = (level["fid_mean"] + sign * level["fid_std"] for sign in (-1, 1))
    axis.axhspan(low, high, color=colour("dense"), alpha=0.1, linewidth=0)
    axis.set_xticks(range(len(rows)), [row["label"] for row in rows])
