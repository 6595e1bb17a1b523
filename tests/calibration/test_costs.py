"""Times of scales, from calls whose times are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dmoe_var.calibration import costs
from dmoe_var.calibration.costs import measure_costs, timed

WARM_UP = [1000.0, 1000.0, 1000.0], 1000.0
DENSE = [WARM_UP, ([1, 2, 3], 4), ([1, 2, 30], 4), ([1, 2, 5], 4)]
HALF = [WARM_UP, ([1, 3, 20], 10), ([2, 5, 22], 10), ([3, 4, 21], 10)]
EVERY = [WARM_UP, ([4, 8, 18], 10), ([5, 7, 19], 10), ([6, 9, 17], 10)]
"""A round each: milliseconds of three scales, and of what comes after."""
EXPERTS = {"half": [[1, 3]], "every": [[4, 4]]}
"""Of four, on two tokens of two layers."""


@pytest.fixture
def table(monkeypatch):
    """Of a model of experts at scales 1 and 2."""
    rounds = {"dense": iter(DENSE), "half": iter(HALF), "every": iter(EVERY)}
    order, steps = [], []

    def scripted(model, vqvae, labels, seed, counts=None, selection=None, impl=""):
        assert (seed, impl) == (3, "reference")
        name = "dense" if model == "dense" else selection
        order.append(name)
        if name != "dense":
            mask = torch.tensor(EXPERTS[name])[..., None] > torch.arange(4)
            for si in (1, 2):
                counts.record(si, mask)
                counts.record(si, mask)
        return next(rounds[name])

    monkeypatch.setattr(costs, "timed", scripted)
    model = SimpleNamespace(
        moe_scales=(1, 2), moe=SimpleNamespace(config=SimpleNamespace(num_experts=4))
    )
    settings = {"1": "every", "0.5": "half"}
    found = measure_costs(
        "dense", model, None, None, settings, 3, 3, lambda: steps.append(1), impl="reference"
    )
    assert order == ["dense", "every", "half"] * 4
    assert len(steps) == 4
    return found


def test_medians_of_all_rounds_but_the_first(table):
    """By hand; at scale 2, where half of the experts seem to take longer than all, all take as
    long."""
    assert table.dense_ms == 12  # of 10, 37, 12
    assert table.whole_ms == {"1": 41, "0.5": 38}
    assert table.fixed_ms == 13.5  # of scale 0 and the rest: 11, 12, 13 and 14, 15, 16
    assert table.by_scale == {1: ((0.5, 4), (1, 8)), 2: ((0.5, 21), (1, 21))}
    assert table.as_lists() == {"1": [[0.5, 4], [1, 8]], "2": [[0.5, 21], [1, 21]]}


def test_times_lie_on_lines_between_densities(table):
    assert table.ms({1: 0.75, 2: 0.6}) == pytest.approx(13.5 + 6 + 21)
    assert table.ms({1: 0.1, 2: 1.0}) == pytest.approx(13.5 + 4 + 21)
    assert table.fastest_ms == 13.5 + 4 + 21


def test_time_of_each_scale_and_of_what_comes_after(monkeypatch):
    clock = iter([5.0, 5.010, 5.030, 5.060])
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def draw(model, vqvae, labels, seed, observer, cfg):
        assert (seed, cfg) == (2, 4.0)
        for si in range(2):
            observer.on_scale(si, torch.zeros(1))
        return torch.zeros(1)

    monkeypatch.setattr(costs, "generate", draw)
    scales, rest = timed(None, None, None, 2, cfg=4.0)
    assert scales == pytest.approx([10, 20])
    assert rest == pytest.approx(30)
