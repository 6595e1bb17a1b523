"""Choose where to save: the loss of quality per saved FLOP is made the same everywhere.

A group is what one tau governs: a scale, or a layer of a scale. Its curve is the loss over its
density, the share of experts that run. The cheapest pieces of all groups' lower convex hulls are
taken until the budget is met. For additive losses that is the least loss at that budget.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

G = TypeVar("G", bound=Hashable)

ROUNDING = 1e-9
"""How far, as a share, sums may miss their target."""


@dataclass(frozen=True)
class LossCurve:
    """A group's loss over its density; density 1 has loss 0.

    cost: what the group costs with every expert on, in any unit.
    """

    density: tuple[float, ...]
    loss: tuple[float, ...]
    cost: float

    def hull(self) -> list[tuple[float, float]]:
        """Find the lower convex hull, (density, loss) falling in density from (1, 0). A loss that
        falls as the density falls is noise; it is raised to the highest before it."""
        measured = {**dict(zip(self.density, self.loss, strict=True)), 1.0: 0.0}
        falling = sorted(measured, reverse=True)
        raised = accumulate((measured[density] for density in falling), max)
        hull: list[tuple[float, float]] = []
        for point in zip(falling, raised, strict=True):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Divide the loss by the density that is saved from a to b."""
    return (b[1] - a[1]) / (a[0] - b[0])


def allocate(curves: Mapping[G, LossCurve], saved: float) -> dict[G, float]:
    """Find the densities of the groups that together save `saved` (in the unit of the costs) at the
    least loss. Raise ValueError if the curves cannot save as much."""
    pieces = []
    for group, curve in curves.items():
        hull = curve.hull()
        for start, end in pairwise(hull):
            width = (start[0] - end[0]) * curve.cost
            pieces.append((_slope(start, end) / curve.cost, group, start[0], end[0], width))
    densities = dict.fromkeys(curves, 1.0)
    left = saved
    for _, group, high, low, width in sorted(pieces, key=lambda piece: piece[0]):
        if left <= 0:
            break
        taken = min(left, width)
        densities[group] = high - (high - low) * taken / width
        left -= taken
    if left > ROUNDING * max(saved, 1e-300):
        most = sum(piece[-1] for piece in pieces)
        raise ValueError(f"{saved:.4g} cannot be saved, at most {most:.4g}")
    return densities


def tau_at(falls: Callable[[float], float], target: float) -> float:
    """Find the tau in [0, 1] at which a quantity that falls as tau rises has come down to `target`.
    Raise ValueError if tau 1 leaves more."""
    least = falls(1.0)
    if least > target + ROUNDING * abs(target):
        raise ValueError(f"{target:.4g} cannot be reached, tau 1 leaves {least:.4g}")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) > target else (low, middle)
    return high
