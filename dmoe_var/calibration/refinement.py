"""Refine tau from losses measured one group at a time, until the loss of quality per saved FLOP is
equal while all groups act together.

Saving at one scale changes what saving at the next costs, so the additive solution is a start only.
A round measures the slope of the joint loss in every group. It moves FLOPs from groups where saving
hurts more than on average to those where it hurts less, as long as the loss falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dmoe_var.calibration.allocation import tau_at
from dmoe_var.calibration.calibrate import Group, Plan, Taus

STEP = 0.1
"""The largest change of a group's density in a round; slopes are measured at the same change."""
EDGE = 1e-6
"""How close to the end of its range a density counts as being there."""
ROUNDING = 1e-9
"""Share of the steepest slope up to which two slopes count as equal."""
TRIES = 3
"""Lengths of a move that are tried in a round, each half of the one before."""


def most_losses(num_groups: int, rounds: int) -> int:
    """Count how many losses `refine` may measure, with two starts."""
    return 2 + rounds * (num_groups + TRIES)


def refine(plan: Plan, starts: list[Taus], loss: Callable[[Taus], float], rounds: int) -> Taus:
    """Improve the best of `starts`, tau that cost the same: equal GMAC, and a loss no higher.

    loss: of the quality, in any unit, measured at most `most_losses` times.
    """
    measured = [(loss(taus), number) for number, taus in enumerate(starts)]
    lowest, number = min(measured)
    densities = {group: plan.density(group, tau) for group, tau in starts[number].items()}
    best, step = starts[number], STEP
    for _ in range(rounds):
        slopes = _slopes(plan, densities, lowest, loss, step)
        for _ in range(TRIES):
            moved = _moved(plan, densities, slopes, step)
            taus = _taus(plan, moved)
            found = loss(taus)
            if found < lowest:
                best, lowest, densities = taus, found, moved
                break
            step /= 2
    return best


def at_cost(taus: Taus, cost: Callable[[Taus], float], target: float) -> Taus:
    """Multiply all tau by one factor, none above 1, so that they cost `target`. Those of 0 stay 0;
    if that is not enough, they rise together beside the others at 1. Raise ValueError if tau 1
    everywhere costs more."""

    def times(odds: float) -> Taus:
        factor = odds / (1 - odds) if odds < 1 else float("inf")
        return {group: min(1.0, tau * factor) if tau else 0.0 for group, tau in taus.items()}

    def beside(low: float) -> Taus:
        return {group: 1.0 if tau else low for group, tau in taus.items()}

    way = times if cost(times(1.0)) <= target else beside
    return way(tau_at(lambda along: cost(way(along)), target))


def _slopes(
    plan: Plan,
    densities: Mapping[Group, float],
    start: float,
    loss: Callable[[Taus], float],
    step: float,
) -> dict[Group, float]:
    """Measure the rise of the joint loss per GMAC that a group saves. A group with nothing left to
    save is measured the other way."""
    slopes = {}
    for group, density in densities.items():
        least = plan.density(group, 1.0)
        to = density - step if density - step >= least else min(1.0, density + step)
        saved = (density - to) * plan.full_gmac(group)
        changed = loss(_taus(plan, {**densities, group: to})) if saved else start
        slopes[group] = (changed - start) / saved if saved else 0.0
    return slopes


def _moved(
    plan: Plan, densities: Mapping[Group, float], slopes: Mapping[Group, float], length: float
) -> dict[Group, float]:
    """Move densities by this length at equal cost. A density rises if saving there costs more loss
    per GMAC than on average."""
    least = {group: plan.density(group, 1.0) for group in densities}
    free = set(densities)
    while True:
        cost = sum(plan.full_gmac(g) for g in free)
        mean = sum(plan.full_gmac(g) * slopes[g] for g in free) / cost if free else 0.0
        pinned = {
            g
            for g in free
            if (slopes[g] > mean and densities[g] > 1 - EDGE)
            or (slopes[g] < mean and densities[g] < least[g] + EDGE)
        }
        if not pinned:
            break
        free -= pinned
    changes = {g: slopes[g] - mean if g in free else 0.0 for g in densities}
    largest = max((abs(change) for change in changes.values()), default=0.0)
    if largest <= ROUNDING * max(map(abs, slopes.values()), default=0.0):
        return dict(densities)  # else rounding of equal slopes would be stretched to a whole step
    scale = length / largest
    for g, change in changes.items():  # no group leaves its range: the whole move is shortened
        room = 1 - densities[g] if change > 0 else densities[g] - least[g]
        if change:
            scale = min(scale, room / abs(change))
    return {g: densities[g] + scale * change for g, change in changes.items()}


def _taus(plan: Plan, densities: Mapping[Group, float]) -> Taus:
    return {group: plan.tails[group].tau(density) for group, density in densities.items()}
