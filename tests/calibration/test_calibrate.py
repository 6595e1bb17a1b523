"""Plans in closed form: what an image costs under some tau, and which tau a budget wants."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_var.calibration.calibrate import Losses, Plan, measure_losses, taus_for
from dmoe_var.calibration.scores import EDGES_G, Tails
from dmoe_var.metrics.flops import report
from dmoe_var.metrics.flops_fixed import ExpertCost, FixedCost
from dmoe_var.moe.counts import ExpertHistogram
from dmoe_var.moe.selection import LayerThreshold, Threshold

LEAST = {(1, 0): 0.1, (1, 1): 0.2, (2, 0): 0.3, (2, 1): 0.5}
"""By cell, the share of experts that tau 1 runs; what tau runs falls linearly to it."""
CELLS = {
    cell: Tails(1 - (1 - least) * EDGES_G, (10 + cell[0] + 4 * cell[1]) * EDGES_G)
    for cell, least in LEAST.items()
}
FIXED = FixedCost(
    branches=2,
    macs={
        part: (1 << 3 * i, 2 << 3 * i, 4 << 3 * i)
        for i, part in enumerate(("qkv_proj", "attention", "ffn", "head", "adaln", "other"))
    },
    decoder_macs=10**12,
    experts={1: ExpertCost(2000, 3000, 70_000), 2: ExpertCost(4000, 3000, 900_000)},
)


@pytest.fixture(params=[False, True], ids=["by scale", "by layer"])
def plan(request):
    return Plan.of(FIXED, CELLS, by_layer=request.param)


def counted(taus):
    """GMAC as images are counted whose cells run what LEAST says under a tau for each cell."""
    pairs = {1: 0.0, 2: 0.0}
    for (si, layer), tau in taus.items():
        pairs[si] += FIXED.experts[si].num_pairs / 2 * (1 - (1 - LEAST[si, layer]) * tau)
    every = [FIXED.experts[si].num_pairs for si in pairs]
    ran = [round(number) for number in pairs.values()]  # as of one expert that runs, or does not
    times_1SK = np.array([[(of - n, n) for of, n in zip(every, ran, strict=True)]])
    histogram = ExpertHistogram(tuple(pairs), times_1SK)
    return report(FIXED, histogram, dict.fromkeys(pairs, Threshold(0.5))).total_gmac


def test_a_plan_costs_what_is_counted(plan):
    """Every part of the sampler and the routers, and none that a total leaves out."""
    for by_scale in ({1: 0.0, 2: 0.0}, {1: 0.5, 2: 0.2}, {1: 1.0, 2: 0.5}, {1: 1.0, 2: 1.0}):
        taus = {group: by_scale[group[0]] for group in plan.tails}
        expected = counted({cell: by_scale[cell[0]] for cell in CELLS})
        assert plan.gmac(taus) == pytest.approx(expected, rel=1e-9)
    ends = [counted(dict.fromkeys(CELLS, tau)) for tau in (1.0, 0.0)]
    assert plan.reachable() == pytest.approx(ends, rel=1e-9)


def test_a_tau_for_each_layer_or_scale():
    plan = Plan.of(FIXED, CELLS, by_layer=True)
    taus = {(1, 0): 0.1, (1, 1): 0.9, (2, 0): 0.6, (2, 1): 0.4}
    assert plan.gmac(taus) == pytest.approx(counted(taus), rel=1e-9)
    assert plan.rules(taus) == [LayerThreshold((0.1, 0.9)), LayerThreshold((0.6, 0.4))]
    assert plan.as_lists(taus) == [[0.1, 0.9], [0.6, 0.4]]
    plan = Plan.of(FIXED, CELLS, by_layer=False)
    taus = {(2,): 0.4, (1,): 0.1}
    assert plan.rules(taus) == [Threshold(0.1), Threshold(0.4)]
    assert plan.as_lists(taus) == [0.1, 0.4]


def test_losses_are_of_one_group_above_those_of_every_expert(plan):
    """5 with every expert, and of each group its own weight times tau; the others run all."""
    weights = {group: 1 + sum(group) for group in plan.tails}
    steps = []

    def loss(taus):
        assert sum(tau > 0 for tau in taus.values()) <= 1
        return 5 + sum(weights[group] * tau for group, tau in taus.items())

    found = measure_losses(plan, (0.9, 0.7), loss, lambda: steps.append(1))
    assert found.keys() == plan.tails.keys()
    for group, each in found.items():
        least = plan.density(group, 1.0)
        expected = [(1 - share) / (1 - least) for share in (0.9, 0.7)]
        assert each.taus == pytest.approx([*expected, 1.0], abs=1e-3)
        assert each.losses == pytest.approx([weights[group] * tau for tau in each.taus])
    assert len(steps) == 3 * len(plan.tails)


def test_dropped_norms_of_a_scale_are_those_of_all_its_layers(plan):
    found = measure_losses(plan, (0.9,), None, lambda: pytest.fail("nothing is measured"))
    for group, each in found.items():
        cells = [cell for cell in CELLS if cell[: len(group)] == group]
        energy = sum(10 + si + 4 * layer for si, layer in cells)
        assert each.losses == pytest.approx([energy * tau for tau in each.taus])


def test_the_target_is_met_where_saving_costs_least():
    """Scale 2 loses more for a share of its experts, and less for a GMAC: it has twice as many."""
    plan = Plan.of(FIXED, CELLS, by_layer=False)
    lost = {(1,): 1.0, (2,): 1.5}
    losses = {
        group: Losses((1.0,), (weight * (1 - plan.density(group, 1.0)),))
        for group, weight in lost.items()
    }
    found = taus_for(plan, losses, target := plan.reachable()[1] - 0.004)
    assert found[1,] == 0
    assert 0 < found[2,] < 1
    assert plan.gmac(found) == pytest.approx(target, rel=1e-6)
    further = taus_for(plan, losses, target := plan.reachable()[0] + 0.002)
    assert further[2,] == 1
    assert plan.gmac(further) == pytest.approx(target, rel=1e-6)
