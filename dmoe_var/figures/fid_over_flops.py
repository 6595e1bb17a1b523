"""Figure 3: FID over FLOPs of the tau sweep, from one sweep record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmoe_var.figures.style import COLOURS, MARKERS, plt, save

LABELS = {
    "dense": "dense VAR",
    "last": "one tau, last scales",
    "all": "one tau, all scales",
    "lists": "tau a scale",
    "chosen": "operating point",
}


def display_name(metric: str) -> str:
    """`fid_efflite0_64px` as people write it; plain FID is InceptionV3's alone."""
    size = metric.removeprefix("fid_efflite0_").removesuffix("px")
    return "FID" if metric == "fid" else f"FID-EffLite0 ({size} px)"


def draw(settings: Sequence[Mapping[str, Any]], fid_name: str, title: str, path: Path) -> None:
    """Draw the settings of a sweep record (`about["settings"]`): mean FID with the standard
    deviation over seeds as error bars, the dense model as a star, the chosen tau as a cross."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    for group, label in LABELS.items():
        rows = [s for s in settings if s["group"] == group]
        if not rows:
            continue
        rows.sort(key=lambda row: row["flops_gmac"])
        gmac = np.array([row["flops_gmac"] for row in rows])
        fid = np.array([row["fid_mean"] for row in rows])
        spread = np.array([row["fid_std"] for row in rows])
        line = "-" if group in ("last", "all") else "none"
        size = {"dense": 11, "chosen": 10}.get(group, 4)
        axis.errorbar(
            gmac, fid, yerr=spread, label=label, color=COLOURS[group], marker=MARKERS[group],
            linestyle=line, markersize=size, markeredgewidth=2 if group == "chosen" else 1,
            capsize=2, linewidth=1.2, zorder=5 if group == "chosen" else 3,
        )  # fmt: skip
        if group in ("last", "all"):
            for row in rows:
                axis.annotate(
                    row["label"], (row["flops_gmac"], row["fid_mean"]), xytext=(3, 4),
                    textcoords="offset points", fontsize=6, color=COLOURS[group],
                )  # fmt: skip
    axis.set_xlabel("transformer GMAC an image (guidance included, decoder left out)")
    axis.set_ylabel(display_name(fid_name))
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)
    save(figure, path)
