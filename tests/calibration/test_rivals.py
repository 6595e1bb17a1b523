"""The other ways to choose tau, on costs and losses in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dmoe_var.calibration.rivals import Trial, one_tau, rising, search, within


def cost(taus):
    return 1 + sum(1 - tau for tau in taus)


def test_one_tau():
    assert one_tau(cost, 3, 2.5) == pytest.approx((0.5, 0.5, 0.5))


def test_rising_takes_the_best_slope_at_the_budget():
    calls = []

    def loss(taus):
        calls.append(taus)
        return (taus[2] - taus[0] - 0.5) ** 2

    found = rising(cost, loss, 3, 2.5, tries=5)
    assert cost(found) == pytest.approx(2.5, rel=0.011)
    assert found[2] - found[0] == pytest.approx(0.5)
    assert len(calls) <= 5


def test_search_is_a_pareto_front_within_its_steps():
    trials = search(cost, lambda taus: sum(tau**2 for tau in taus), 3, 25, seed=0)
    assert trials == search(cost, lambda taus: sum(tau**2 for tau in taus), 3, 25, seed=0)
    costs = [trial.cost for trial in trials]
    losses = [trial.loss for trial in trials]
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    for trial in trials:
        steps = [b - a for a, b in pairwise(trial.taus)]
        assert all(0 <= step <= 0.2 + 1e-12 for step in steps)
        assert trial.cost == pytest.approx(cost(trial.taus))


def test_within():
    trials = [Trial((0.9,), 3.0, 1.0), Trial((0.5,), 2.0, 2.0), Trial((0.1,), 1.0, 3.0)]
    assert within(trials, 2.0) == trials[1]
    assert within(trials, 1.985) == trials[1]  # a hundredth above
    assert within(trials, 1.9) == trials[0]
    assert within(trials, 0.5) is None
