"""Refined tau against closed forms, where saving at one scale makes saving at another cost more."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_var.calibration.calibrate import Plan
from dmoe_var.calibration.refinement import at_cost, most_losses, refine
from dmoe_var.calibration.rivals import one_tau as one_tau_everywhere
from dmoe_var.calibration.rivals import rising
from dmoe_var.calibration.scores import EDGES_G, Tails
from dmoe_var.metrics.flops_fixed import ExpertCost, FixedCost

COSTS = {0: 1.0, 1: 2.0, 2: 4.0}
"""GMAC of a scale with every expert on."""
SAVED = 2.1
WEIGHTS = np.array([[2.0, 0.5, 0.0], [0.5, 3.0, 1.5], [0.0, 1.5, 10.0]])


@pytest.fixture(scope="module")
def plan():
    """Of three scales, of whose experts tau runs 1 - 0.9 tau."""
    experts = {si: ExpertCost(1000, round(cost * 1e6), 0) for si, cost in COSTS.items()}
    tails = Tails(1 - 0.9 * EDGES_G, EDGES_G)
    return Plan(FixedCost(2, {}, 0, experts), {(si,): tails for si in COSTS}, num_layers=1)


def saved_shares(plan, taus):
    return np.array([1 - plan.density((si,), taus[si,]) for si in COSTS])


@pytest.fixture
def loss(plan):
    """s' W s of the saved shares s, and what it was asked."""

    def measured(taus):
        measured.calls.append(taus)
        share = saved_shares(plan, taus)
        return float(share @ WEIGHTS @ share)

    measured.calls = []
    return measured


@pytest.fixture
def one_tau(plan):
    taus = at_cost(dict.fromkeys(plan.tails, 0.5), plan.gmac, 7 - SAVED)
    assert len(set(taus.values())) == 1
    return taus


def best_loss():
    """Least s' W s with c' s = SAVED: s = W^-1 c SAVED / (c' W^-1 c)."""
    cost = np.array(list(COSTS.values()))
    return SAVED**2 / float(cost @ np.linalg.solve(WEIGHTS, cost))


def test_near_the_joint_optimum(plan, loss, one_tau):
    start = loss(one_tau)
    loss.calls.clear()
    found = refine(plan, [one_tau], loss, rounds=3)
    after_three = loss(found)
    assert len(loss.calls) - 1 <= most_losses(3, 3) - 1  # one start
    assert plan.gmac(found) == pytest.approx(7 - SAVED, rel=1e-3)
    assert after_three - best_loss() < 0.25 * (start - best_loss())
    after_many = loss(refine(plan, [one_tau], loss, rounds=30))
    assert after_many == pytest.approx(best_loss(), rel=0.01)
    assert after_many >= best_loss() * (1 - 1e-6)


def test_the_better_start_and_never_worse(plan, loss, one_tau):
    uneven = at_cost({(0,): 0.9, (1,): 0.1, (2,): 0.5}, plan.gmac, 7 - SAVED)
    assert loss(uneven) > loss(one_tau)
    assert refine(plan, [uneven, one_tau], loss, rounds=0) is one_tau
    assert refine(plan, [one_tau, uneven], loss, rounds=0) is one_tau
    assert loss(refine(plan, [uneven, one_tau], loss, rounds=1)) < loss(one_tau)
    assert refine(plan, [one_tau], lambda taus: 1.0, rounds=3) is one_tau


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_at_an_end_stays_in_its_range(plan, sign):
    """Scale 0 is on, or at tau 1, and its slope would push it further: the others trade."""
    start = at_cost({(0,): 0.0 if sign > 0 else 1.0, (1,): 0.2, (2,): 0.6}, plan.gmac, 7 - SAVED)
    if sign < 0:
        start = {**start, (0,): 1.0}

    def loss(taus):
        first, *others = saved_shares(plan, taus)
        return sign * 9 * first + others[0] + 4 * others[1] ** 2

    found = refine(plan, [start], loss, rounds=3)
    assert found[0,] == pytest.approx(start[0,], abs=1e-3)
    assert plan.gmac(found) == pytest.approx(plan.gmac(start), rel=1e-3)
    assert loss(found) < loss(start)
    assert all(0 <= tau <= 1 for tau in found.values())


def test_a_group_comes_back_from_the_end_of_its_range(plan):
    """Scale 0 runs as little as it can, though saving there hurts most."""
    start = {(0,): 1.0, (1,): 0.2, (2,): 0.2}
    found = refine(plan, [start], lambda taus: 9 * saved_shares(plan, taus)[0] ** 2, rounds=1)
    assert found[0,] < 0.95


def test_at_cost(plan):
    taus = {(0,): 0.0, (1,): 0.2, (2,): 0.4}
    found = at_cost(taus, plan.gmac, 5.0)
    assert plan.gmac(found) == pytest.approx(5.0)
    assert found[0,] == 0
    assert found[2,] == pytest.approx(2 * found[1,])
    cheap = at_cost(taus, plan.gmac, 2.0)  # scale 2 ends at tau 1, scale 1 goes on alone
    assert cheap[2,] == 1
    assert plan.gmac(cheap) == pytest.approx(2.0)
    # what is on is saved from where nothing else is left
    found = at_cost({(0,): 0.9, (1,): 0.0, (2,): 0.0}, plan.gmac, 3.0)
    assert plan.gmac(found) == pytest.approx(3.0)
    assert found[0,] == 1
    assert found[1,] == found[2,] > 0


def test_any_start_meets_any_budget_or_says_that_none_does():
    """Random costs, curves and tau, of which some are 0 or 1; targets on both sides of what can be
    reached."""
    generator = np.random.default_rng(0)
    for _ in range(40):
        size = int(generator.integers(1, 5))
        experts, tails, taus = {}, {}, {}
        for si in range(size):
            experts[si] = ExpertCost(1000, int(generator.integers(1, 10**7)), 0)
            falls = np.cumsum(generator.random(len(EDGES_G)) ** 4)
            falls = (falls - falls[0]) / (falls[-1] - falls[0]) * generator.uniform(0.1, 1)
            tails[si,] = Tails(1 - falls, EDGES_G)
            taus[si,] = float(generator.choice([0.0, 1.0, generator.random(), 1e-6]))
        plan = Plan(FixedCost(2, {}, 0, experts), tails, num_layers=1)
        least, most = plan.reachable()
        share = generator.uniform(0.01, 0.99)
        target = least + share * (most - least)

        def cost(values, plan=plan):
            return plan.gmac({(si,): tau for si, tau in enumerate(values)})

        found = at_cost(taus, plan.gmac, target)
        assert plan.gmac(found) == pytest.approx(target, rel=1e-6)
        assert all(0 <= tau <= 1 for tau in found.values())
        refined = refine(plan, [found], lambda t: -sum(t.values()), rounds=2)
        assert plan.gmac(refined) == pytest.approx(target, rel=1e-3)
        assert cost(one_tau_everywhere(cost, size, target)) == pytest.approx(target, rel=1e-6)
        line = rising(cost, lambda values: values[-1], size, target, tries=3)
        assert cost(line) <= target * (1 + 1e-6)
        below = 0.999 * least
        for way in (
            lambda: at_cost(taus, plan.gmac, below),  # noqa: B023
            lambda: one_tau_everywhere(cost, size, below),  # noqa: B023
            lambda: rising(cost, lambda values: 0.0, size, below, tries=3),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="cannot be reached, tau 1 leaves"):
                way()
