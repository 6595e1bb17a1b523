"""Recorded scores, against the masks of Eq. 3 itself."""

from __future__ import annotations

import pytest
import torch

from dmoe_var.calibration.scores import BINS, EDGES_G, _Sums, record_scores
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.selection import LayerThreshold, Threshold


@pytest.fixture
def scores():
    return torch.rand(3, 50, 16, generator=torch.Generator().manual_seed(0)) ** 2


def test_densities_are_those_of_eq_3(scores):
    sums = _Sums()
    for part in scores:
        sums.add(part[None])
    tails = sums.tails()
    for edge in (0, 1, BINS // 7, BINS // 2, BINS - 1, BINS):
        mask = Threshold(float(EDGES_G[edge]))(scores.double())
        assert tails.density_G[edge] == pytest.approx(mask.double().mean().item(), abs=1e-12)
        dropped = (scores.double().square() * ~mask).sum(-1).mean()
        assert tails.dropped_G[edge] == pytest.approx(dropped.item(), abs=1e-9)
    assert tails.density(0) == 1
    assert tails.density(1) >= 1 / 16


def test_tau_of_a_density(scores):
    sums = _Sums()
    sums.add(scores)
    tails = sums.tails()
    for density in (0.1, 0.33, 0.5, 0.9):
        mask = Threshold(tails.tau(density))(scores.double())
        assert mask.double().mean().item() == pytest.approx(density, abs=2e-3)
    assert tails.tau(1.0) == 0
    assert tails.tau(0.0) == 1


def test_tokens_without_scores_run_everything():
    sums = _Sums()
    sums.add(torch.zeros(1, 4, 8))
    assert sums.tails().density(1) == 1


@pytest.fixture
def model(make_var, make_moe):
    dense = make_var()
    return DynamicVAR(dense, make_moe(dense), moe_scales=(1, 2))


def test_recorded_on_a_model(model, make_teacher):
    """The first sparse scale sees the same at every tau: what was recorded is what runs there."""
    teacher = make_teacher(model.dense, batch=3)
    labels = torch.tensor([0, 1, 2])
    cells = record_scores(model, [(labels, teacher)])
    depth = model.config.depth
    assert sorted(cells) == [(si, i) for si in (1, 2) for i in range(depth)]
    null = torch.full_like(labels, model.config.num_classes)
    taus = [0.25, 0.5, 0.75, 0.875][:depth]
    rules = [LayerThreshold((*taus[:1], *[0.0] * (depth - 1))), Threshold(0.0)]
    ran = []
    for each in (labels, null):
        counts = ExpertCounts()
        model(each, teacher, selection=rules, observer=counts)
        ran.append(counts.per_token(1)[0].double())
    share = torch.cat(ran).mean().item() / model.moe.config.num_experts
    assert cells[1, 0].density(taus[0]) == pytest.approx(share, abs=1e-3)
