"""The clock's parts: that they are the whole, where they are put, and what they leave as it was."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from dmoe_var import DynamicVAR, generate
from dmoe_var.metrics import part_timing
from dmoe_var.metrics.part_timing import (
    PARTS,
    PartClock,
    PartTimes,
    median_by_part,
    median_by_scale,
)
from dmoe_var.models.blocks import FFN, SelfAttention
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.router import Router
from dmoe_var.moe.selection import Random, Threshold

CPU = torch.device("cpu")


@pytest.fixture
def dynamic(make_var, make_moe):
    dense = make_var(0)
    return DynamicVAR(dense, make_moe(make_var(1, activation="relu")), (2, 3))


def clocked(model, vqvae, told_apart=True, **options):
    """Parts, wall time in ms, images."""
    clock = PartClock(CPU)
    started = time.perf_counter()
    with clock.running(model, told_apart):
        images = generate(model, vqvae, [0, 1], observer=clock, **options)
    return clock.read(), 1000 * (time.perf_counter() - started), images


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_parts_are_the_whole(dynamic, make_vqvae):
    """Nothing twice, nothing missing; hooks are gone; images are those without a clock."""
    vqvae = make_vqvae()
    times, wall, images = clocked(dynamic, vqvae, tau=0.5)
    assert 0.7 * wall < times.total_ms <= wall
    assert sum(times.by_part_ms.values()) == pytest.approx(times.total_ms)
    outside = sum(ms for (_, si), ms in times.by_part_and_scale_ms.items() if si is None)
    assert sum(times.by_scale_ms) + outside == pytest.approx(times.total_ms)
    assert list(times.by_part_ms) == list(PARTS)  # all ran, in this order
    assert all(ms >= 0 for ms in times.by_part_and_scale_ms.values())
    assert hooks(dynamic) == 0
    assert torch.equal(images, generate(dynamic, vqvae, [0, 1], tau=0.5))


def test_where_parts_run(dynamic, make_vqvae):
    """Experts and routers at sparse scales, dense FFNs at the others, the decoder at none."""
    times, _, _ = clocked(dynamic, make_vqvae(), tau=0.5)
    scales = {}
    for part, si in times.by_part_and_scale_ms:
        scales.setdefault(part, set()).add(si)
    assert scales["router"] == scales["selection"] == scales["experts"] == {2, 3}
    assert scales["ffn"] == {0, 1}
    assert scales["decoder"] == {None}
    every = {0, 1, 2, 3}
    for part in ("attention", "head", "embedding", "sampling", "quantiser", "transformer"):
        assert scales[part] == every
    by_chance, _, _ = clocked(dynamic, make_vqvae(), selection=Random(2))
    assert "router" not in by_chance.by_part_ms
    all_run, _, _ = clocked(dynamic, make_vqvae())
    assert not {"router", "selection"} & all_run.by_part_ms.keys()


@pytest.mark.parametrize(
    ("owner", "method", "part"),
    [
        (SelfAttention, "forward", "attention"),
        (FFN, "forward", "ffn"),
        (Router, "forward", "router"),
        (Threshold, "__call__", "selection"),
        (VQVAE, "decode_f_hat", "decoder"),
    ],
)
def test_a_part_that_takes_longer(dynamic, make_vqvae, monkeypatch, owner, method, part):
    """All the time of a clock that moves in one place alone is of its part and of no other."""
    plain = getattr(owner, method)
    now = 0.0

    def slow(*args, **kwargs):
        nonlocal now
        now += 2.0**-5
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, method, slow)
    monkeypatch.setattr(part_timing.time, "perf_counter", lambda: now)
    times, _, _ = clocked(dynamic, make_vqvae(), tau=0.5)
    assert times.by_part_ms[part] == 1000 * now > 0
    assert times.total_ms == 1000 * now


def test_a_model_whose_parts_are_not_told_apart(dynamic, make_vqvae):
    times, _, _ = clocked(dynamic, make_vqvae(), told_apart=False)
    assert set(times.by_part_ms) == {
        "transformer", "embedding", "sampling", "quantiser", "decoder", "rest",
    }  # fmt: skip


def test_a_call_that_fails(dynamic, make_vqvae):
    """Its hooks go."""
    clock = PartClock(CPU)
    with pytest.raises(ValueError, match="no call has ended"):
        clock.read()
    with pytest.raises(ValueError, match="labels"), clock.running(dynamic):
        generate(dynamic, make_vqvae(), [99], observer=clock)
    assert hooks(dynamic) == 0


def test_medians():
    runs = [
        PartTimes({("attention", 0): a, ("attention", 1): 1.0, ("decoder", None): 2 * a})
        for a in (1.0, 5.0, 2.0)
    ]
    assert median_by_part(runs) == {"attention": 3.0, "decoder": 4.0}
    assert median_by_scale(runs) == [2.0, 1.0]
    assert np.isclose(runs[1].total_ms, 16.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_of_a_cuda_device(dynamic, make_vqvae):
    device = torch.device("cuda")
    clock = PartClock(device)
    model, vqvae = dynamic.to(device), make_vqvae().to(device)
    with clock.running(model):
        generate(model, vqvae, [0, 1], tau=0.5, observer=clock)
    assert list(clock.read().by_part_ms) == list(PARTS)
