"""Judge claims on a figure's data, by the mean gap in FID between two curves.

Two curves are compared seed by seed over the FLOPs that both reach, linearly between their points.
A gap counts if Student's t gives its mean over seeds a chance below 5 %; otherwise the claim is
neither confirmed nor contradicted. Seeds are those of sampling: no error includes what training
the models again would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from dmoe_var import markdown

Curve = Mapping[str, Any]
GRID = 50
"""Number of FLOPs values at which two curves are compared."""
SURE = 0.05
"""A gap counts if chance alone gives one as large less often than this."""
NARROW = 0.02
"""Least share of the FLOPs that two curves must have in common to be compared."""


@dataclass(frozen=True)
class Gap:
    """Holds the FID of one curve minus that of another, over FLOPs from `low` to `high`.

    FLOPs are in GMAC and gaps in FID. If `relative`, they are shares of the dense model's FLOPs and
    percent of its FID. mean: over seeds; error: its standard error, None with one seed. lower,
    upper: means over the lower and the upper half of the FLOPs.
    """

    mean: float
    error: float | None
    low: float
    high: float
    lower: float
    upper: float
    num_seeds: int
    relative: bool = False

    @property
    def counts(self) -> bool:
        """Whether the gap is more than chance."""
        if self.error is None:
            return False
        return abs(self.mean) > student.ppf(1 - SURE / 2, self.num_seeds - 1) * self.error


@dataclass(frozen=True)
class Verdict:
    """Holds a claim and what the data say. gap: the curve that is claimed to be better minus the
    other; None if they share too few FLOPs."""

    claim: str
    figure: str
    better: str
    worse: str
    gap: Gap | None

    @property
    def says(self) -> str:
        if self.gap is None:
            return "cannot be told: the curves share too few FLOPs"
        if self.gap.error is None:
            return "cannot be told: one seed"
        if not self.gap.counts:
            return "not settled: within the spread over seeds"
        said = "confirmed" if self.gap.mean < 0 else "contradicted"
        for half in ("lower", "upper"):
            if getattr(self.gap, half) * self.gap.mean < 0:
                said += f", but not in the {half} half of the FLOPs"
        return said


def gap(better: Curve, worse: Curve, relative: Sequence[Curve] = ()) -> Gap | None:
    """Compute the gap between two curves; None if they share too few FLOPs.

    relative: the dense curve of each; FLOPs and FID are then relative to these.
    """
    a, b = (_lines(c, d) for c, d in zip((better, worse), relative or (None, None), strict=True))
    low, high = max(a[0][0], b[0][0]), min(a[0][-1], b[0][-1])
    if high - low < NARROW * high:
        return None
    grid = np.linspace(low, high, GRID)
    gaps = np.array([
        np.interp(grid, a[0], ours) - np.interp(grid, b[0], theirs)
        for ours, theirs in zip(a[1], b[1], strict=True)
    ])  # fmt: skip
    by_seed = gaps.mean(1)
    seeds = len(by_seed)
    return Gap(
        mean=float(by_seed.mean()),
        error=float(by_seed.std(ddof=1) / seeds**0.5) if seeds > 1 else None,
        low=float(low),
        high=float(high),
        lower=float(gaps[:, : GRID // 2].mean()),
        upper=float(gaps[:, GRID // 2 :].mean()),
        num_seeds=seeds,
        relative=bool(relative),
    )


def _lines(curve: Curve, dense: Curve | None) -> tuple[Any, Any]:
    """Return a curve's FLOPs (points,), rising, and FID (seeds, points)."""
    rows = sorted(curve["rows"], key=lambda row: float(row["flops_gmac"]))
    flops: npt.NDArray[Any] = np.array([row["flops_gmac"] for row in rows])
    fid: npt.NDArray[Any] = np.array([row["fid_by_seed"] for row in rows]).T
    if dense is not None:
        (level,) = dense["rows"]
        flops = flops / level["flops_gmac"]
        fid = 100 * (fid / np.array(level["fid_by_seed"])[:, None] - 1)
    return flops, fid


def table(found: Sequence[Verdict]) -> str:
    """Write the verdicts as a Markdown table."""
    heads = ["claim", "figure", "FID of", "minus FID of", "compared over"]
    heads += ["mean gap (standard error)", "lower, upper half", "verdict"]
    rows = [(v.claim, v.figure, v.better, v.worse, *_shown(v.gap), v.says) for v in found]
    return (
        f"{markdown.table(heads, rows)}\n\n"
        "Errors are over seeds of sampling; every model was trained once. Each line is a test at "
        f"{100 * SURE:g} % by itself: nothing is corrected for their number."
    )


def _shown(found: Gap | None) -> tuple[str, str, str]:
    """Write the FLOPs, mean and halves of a gap."""
    if found is None:
        return "-", "-", "-"
    unit = " %" if found.relative else ""
    flops = f"{found.low:.3f} to {found.high:.3f} GMAC"
    if found.relative:
        flops = f"{100 * found.low:.0f} to {100 * found.high:.0f} % of dense"
    error = "" if found.error is None else f" ({found.error:.2f})"
    halves = f"{found.lower:+.1f}, {found.upper:+.1f}{unit}"
    return flops, f"{found.mean:+.2f}{error}{unit}", halves
