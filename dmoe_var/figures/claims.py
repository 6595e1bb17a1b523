"""The paper's claims, judged on the figures' data: the mean gap in FID between two curves.

Two curves are compared over the FLOPs that both reach, linearly between their points, seed by
seed. A gap counts where Student's t gives its mean over seeds less than 5 % by chance; otherwise
the claim is neither confirmed nor contradicted. The seeds are those of sampling: what training the
models once more would change is in no error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

Curve = Mapping[str, Any]
GRID = 50
"""Places at which two curves are compared."""
SURE = 0.05
"""Chance of a gap as large where there is none."""


@dataclass(frozen=True)
class Verdict:
    """A claim and what the data say. gap: FID of what the claim holds to be better, minus that of
    the other, mean and standard error over seeds (percentage points where curves are relative to
    their own dense model); None where the curves share no FLOPs."""

    claim: str
    figure: str
    better: str
    worse: str
    gap: float | None
    error: float | None
    num_seeds: int = 1

    @property
    def says(self) -> str:
        if self.gap is None:
            return "cannot be told: the curves share no FLOPs"
        if self.error is None:
            return "cannot be told: one seed"
        if abs(self.gap) <= student.ppf(1 - SURE / 2, self.num_seeds - 1) * self.error:
            return "not settled: within the spread over seeds"
        return "confirmed" if self.gap < 0 else "contradicted"


def gap(better: Curve, worse: Curve, relative: Sequence[Curve] = ()) -> tuple[Any, Any]:
    """Mean gap in FID and its standard error over seeds; None for what cannot be had.

    relative: the dense curve of each; FLOPs and FID are then shares of these.
    """
    a, b = (_lines(c, d) for c, d in zip((better, worse), relative or (None, None), strict=True))
    low, high = max(a[0][0], b[0][0]), min(a[0][-1], b[0][-1])
    if low >= high:
        return None, None
    grid = np.linspace(low, high, GRID)
    gaps = [
        float(np.mean(np.interp(grid, a[0], ours) - np.interp(grid, b[0], theirs)))
        for ours, theirs in zip(a[1], b[1], strict=True)
    ]
    error = float(np.std(gaps, ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else None
    return float(np.mean(gaps)), error


def _lines(curve: Curve, dense: Curve | None) -> tuple[Any, Any]:
    """FLOPs (points,) rising, and FID (seeds, points)."""
    rows = sorted(curve["rows"], key=lambda row: float(row["flops_gmac"]))
    flops: npt.NDArray[Any] = np.array([row["flops_gmac"] for row in rows])
    fid: npt.NDArray[Any] = np.array([row["fid_by_seed"] for row in rows]).T
    if dense is not None:
        (level,) = dense["rows"]
        flops = flops / level["flops_gmac"]
        fid = 100 * (fid / np.array(level["fid_by_seed"])[:, None] - 1)
    return flops, fid


def verdicts(drawn: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """What the drawn figures, data by name, say about the claims that they bear on."""
    found: list[Verdict] = []

    def judge(claim: str, figure: str, better: int, worse: int, dense: Sequence[int] = ()) -> None:
        curves = drawn[figure]["curves"]
        relative = [curves[i] for i in dense]
        mean, error = gap(curves[better], curves[worse], relative)
        names = curves[better]["name"], curves[worse]["name"]
        num_seeds = len(curves[better]["rows"][0]["fid_by_seed"])
        found.append(Verdict(claim, figure, *names, mean, error, num_seeds))

    if "3" in drawn:
        judge("the last scales are the ones to sparsify", "3", 1, 2)
        judge("routing by token beats pruning", "3", 1, 3)
    if "4" in drawn:
        last = len(drawn["4"]["curves"]) - 1
        for other in range(1, last):
            judge("the last scales are the ones to sparsify", "4", last, other)
    if "5" in drawn:
        curves = len(drawn["5"]["curves"])
        if curves > 2:
            judge("a deeper model has more to give", "5", curves - 1, 1, (curves - 2, 0))
    if "7" in drawn:
        judge("ReLU gives more than Hoyer", "7", 2, 3)
        judge("Hoyer adds to ReLU", "7", 1, 2)
    if "8a" in drawn:
        last = len(drawn["8a"]["curves"]) - 1
        if last > 1:
            judge("smaller experts are better in FID", "8a", 1, last)
    if "rules" in drawn:
        names = [curve["name"] for curve in drawn["rules"]["curves"]]
        judge("routers beat chance", "rules", names.index("Eq. 3"), names.index("random k"))
    if "calibration" in drawn:
        names = [curve["name"] for curve in drawn["calibration"]["curves"]]
        for other in names[2:]:
            claim = "calibrated tau is better than tau chosen otherwise"
            judge(claim, "calibration", 1, names.index(other))
    return found


def table(found: Sequence[Verdict]) -> str:
    """The verdicts as a Markdown table."""
    lines = [
        "| claim | figure | FID of | minus FID of | mean gap (standard error) | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for v in found:
        shown = "-" if v.gap is None else f"{v.gap:+.2f}"
        shown += "" if v.error is None else f" ({v.error:.2f})"
        lines.append(f"| {v.claim} | {v.figure} | {v.better} | {v.worse} | {shown} | {v.says} |")
    lines += ["", "Errors are over seeds of sampling; every model was trained once."]
    return "\n".join(lines)
