"""Plot held-out loss over FLOPs for the ways to choose tau, from a calibration's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmoe_var.figures.fid_over_flops import finish
from dmoe_var.figures.style import MARKERS, Paths, colour, save, styled, subplots

NAMES = {
    "calibrated": "calibrated",
    "by_layer": "calibrated by layer",
    "fixed": "one tau",
    "linear": "rising linearly",
    "search": "two-objective search",
}


@styled
def draw(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], dense_gmac: float, title: str, paths: Paths
) -> None:
    """Plot one curve per method; rows hold gmac (predicted) and ce (held-out, nats per token)."""
    figure, axis = subplots(figsize=(5.2, 3.6))
    for method, rows in curves.items():
        points = sorted((row["gmac"], row["ce"]) for row in rows)
        axis.plot(
            *zip(*points, strict=True), label=NAMES[method], color=colour(method),
            marker=MARKERS[method], markersize=4, linewidth=1.2,
        )  # fmt: skip
    axis.axvline(dense_gmac, color=colour("dense"), linestyle="--", linewidth=1, label="dense VAR")
    label = "transformer GMAC an image (guidance included, decoder left out)"
    finish(axis, label, "held-out cross-entropy of the sparse scales", title)
    save(figure, paths)
