"""Paths of experts timed side by side: what the rows say of each other."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from dmoe_var.metrics import kernel_timing
from dmoe_var.metrics.kernel_timing import (
    Layer,
    Rates,
    Shape,
    measured_rates,
    random_layer,
    time_layers,
)
from dmoe_var.moe.experts import paths_on
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import Threshold

SHAPE = Shape("mini", width=16, hidden=64, expert_size=8, tokens=12)
RATES = Rates(gflops_per_s=2.0, gbytes_per_s=4.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    layer = random_layer(SHAPE, [1.0, 0.5], CPU, torch.float32)
    return time_layers(SHAPE, [layer], RATES, repeats=3)


def test_everything_is_timed_once(rows):
    cases = [(row["impl"], row["density"]) for row in rows]
    expected = [("dense_torch", None), ("dense", None), ("selection", None)]
    assert cases == expected + [(i, d) for d in (1.0, 0.5) for i in (*paths_on(CPU), "layer")]
    for row in rows:
        assert 0 < row["ms_min"] <= row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert (row["tokens"], row["expert_size"], row["dtype"]) == (12, 8, "float32")


def test_ratios_are_to_the_faster_dense_ffn(rows):
    baseline = min(row["ms_median"] for row in rows[:2])
    assert min(row["time_ratio"] for row in rows[:2]) == 1
    for row in rows:
        assert row["time_ratio"] == row["ms_median"] / baseline


def test_limits_by_hand(rows):
    """4 x 12 x 16 x 64 multiplications and additions at 2 GFLOP/s; at half the density half of
    them. Both weights, tokens and output, and hidden rows twice, of four bytes, at 4 GB/s."""
    baseline = min(row["ms_median"] for row in rows[:2])
    for row in rows:
        if row["impl"] in ("selection", "layer"):
            assert row.keys().isdisjoint({"limit_ratio", "rate", "zeros"})
            continue
        density = row["density"] or 1.0
        products = 49152 * density / 2e9 * 1e3
        memory = 4 * (2 * 16 * 64 + 2 * 16 * 12 + 2 * 12 * 64 * density) / 4e9 * 1e3
        assert row["limit_ratio"] == pytest.approx(max(products, memory) / baseline)
        assert row["gflops_per_s"] == pytest.approx(49152 * density / row["ms_median"] / 1e6)
        assert row["rate"] == pytest.approx(row["gflops_per_s"] / 2.0)


@pytest.mark.parametrize("density", [1.0, 0.6, 0.3, 0.1])
def test_the_router_of_a_layer_lets_as_much_run(density):
    """A whole layer is timed with its own router at the density that is asked for."""
    shape = replace(SHAPE, tokens=50, expert_size=2)
    assert not random_layer(SHAPE, [0.1], CPU, torch.float32).taus  # one of eight always runs
    layer = random_layer(shape, [density], CPU, torch.float32)
    selected, seen = [], Observer()
    seen.on_routing = selected.append
    layer.ffn(layer.x_NC[None], Routing(Threshold(layer.taus[density]), observer=seen))
    (routed,) = selected
    assert float(routed.mask_BLE.float().mean()) == pytest.approx(density, abs=0.01)
    assert routed.scores_bLE is not None


def test_a_router_takes_what_a_layer_takes_more_than_its_experts(monkeypatch):
    """2, 2 and 6 ms more in three rounds, of which the second was slow; 3, 3 and 6 under graphs.
    The experts run under the mask of that router."""
    layer = random_layer(SHAPE, [0.5], CPU, torch.float32)
    its_own, _ = layer.ffn.select(layer.x_NC[None], Routing(Threshold(layer.taus[0.5])))
    given = []
    slow = {"dense": [10.0, 10.0, 90.0], "layer": [7.0, 30.0, 9.0], "routed": [5.0, 28.0, 3.0]}
    without_host = slow | {"routed": [4.0, 27.0, 3.0]}
    found = iter((slow, without_host))

    def timed(calls, *_):
        times = next(found)
        return {case: times.get(case[0], [20.0] * 3) for case in calls}

    def noting(x_NC, mask_NE, weights, act, impl):
        given.append((mask_NE, impl))

    monkeypatch.setattr(kernel_timing, "run_experts", noting)
    monkeypatch.setattr(kernel_timing, "_in_turn", timed)
    monkeypatch.setattr(kernel_timing, "_captured", lambda calls, device: calls)
    *rows, row = time_layers(SHAPE, [layer], RATES, repeats=3)
    assert row["impl"] == "layer"
    assert "routed" not in {each["impl"] for each in rows}
    for name, share in (("router_time_ratio", 0.2), ("captured_router_time_ratio", 0.3)):
        assert row[name] == pytest.approx(share)
        assert all(name not in each for each in rows)
    kernel_timing._calls([layer])["routed", 0.5]()
    ((mask_NE, impl),) = given
    assert impl == "auto"
    assert torch.equal(mask_NE, its_own[0])


def test_zeros_are_those_of_the_experts_that_run():
    """Of three tokens: a negative bias makes an expert's values 0, a positive one none."""
    layer = random_layer(SHAPE, [1.0], CPU, torch.float32)
    ffn, masks = layer.ffn.requires_grad_(False), torch.zeros(12, 8, dtype=torch.bool)
    ffn.b1_ED[0], ffn.b1_ED[1] = -100, 100
    masks[:3, 0] = True
    assert layer.zeros(masks) == 1
    masks[4:7, 1] = True
    assert layer.zeros(masks) == 0.5
    assert layer.zeros(torch.zeros_like(masks)) == 1


def test_several_layers_are_timed_together(monkeypatch):
    """Each path runs every layer, by its own mask; the limits are those of all."""
    layers = [random_layer(SHAPE, [0.5], CPU, torch.float32) for _ in range(3)]
    layers[1] = Layer(layers[1].ffn, layers[1].x_NC, {0.5: layers[1].masks[0.5].roll(1, 0)})
    ran = []
    monkeypatch.setattr(kernel_timing, "run_experts", lambda x, mask, *_: ran.append(mask))
    layers[2] = replace(layers[2], taus={})  # so that none is timed with its router
    rows = time_layers(SHAPE, layers, RATES, repeats=1)
    masks = [layer.masks[0.5] for layer in layers]
    paths = len(paths_on(CPU))
    assert len(ran) == 2 * 3 * paths
    assert all(a is b for a, b in zip(ran, masks * (2 * paths), strict=True))
    assert {row["layers"] for row in rows} == {3}
    baseline = min(row["ms_median"] for row in rows[:2])
    products = 3 * 49152 * 0.5 / 2e9 * 1e3
    assert rows[-1]["limit_ratio"] * baseline == pytest.approx(products)


def test_tokens_are_written_before_each_call_and_stay_as_they_are(monkeypatch):
    layer = random_layer(SHAPE, [1.0], CPU, torch.float32)
    before, writes = layer.x_NC.clone(), []
    seconds_of = kernel_timing.seconds_of

    def noting(call, device):
        writes.append(layer.x_NC._version)
        return seconds_of(call, device)

    monkeypatch.setattr(kernel_timing, "seconds_of", noting)
    time_layers(SHAPE, [layer], RATES, repeats=2)
    assert len(writes) == len(set(writes)) > 0
    assert torch.equal(layer.x_NC, before)


def test_rates_are_those_of_the_fastest_call(monkeypatch):
    times = {"torch": [4.0, 2.5, 3.0], "ours": [4.0, 2.0, 3.0], "copy": [1.0, 0.5, 2.0]}
    monkeypatch.setattr(kernel_timing, "COPIED", 10**6)
    monkeypatch.setattr(kernel_timing, "SQUARE", 100)
    monkeypatch.setattr(kernel_timing, "_in_turn", lambda calls, *_: times)
    rates = measured_rates(CPU, torch.float32, 3)
    assert rates.gflops_per_s == pytest.approx(2e6 / 2e-3 / 1e9)
    assert rates.gbytes_per_s == pytest.approx(2e6 / 0.5e-3 / 1e9)


def test_a_gpu_is_timed_without_the_host_too(monkeypatch):
    """Calls are recorded as graphs, whose starts are then timed; a path that waits is left out."""
    recorded, started = [], []

    class Graph:
        def replay(self):
            started.append(self)

    @contextmanager
    def recording(graph):
        recorded.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    calls = {("dense", None): lambda: None, ("triton", 0.5): lambda: None}
    captured = kernel_timing._captured(calls, torch.device("cuda"))
    assert captured.keys() == calls.keys()
    assert kernel_timing._captured(calls, CPU) == {}
    for call in captured.values():
        call()
    assert started == recorded
    # Their ratios are to the fastest dense one under graphs.
    rows = [
        {"impl": impl, "density": density, "ms_median": ms, "ms_min": ms, "captured_ms_median": own}
        for impl, density, ms, own in (
            ("dense_torch", None, 3.0, 2.0), ("dense", None, 2.0, 1.0), ("triton", 0.5, 4.0, 0.5),
        )
    ]  # fmt: skip
    kernel_timing._beside_dense(SHAPE, 1, rows, RATES, 4)
    assert [row["captured_time_ratio"] for row in rows] == [2.0, 1.0, 0.5]
    assert [row["time_ratio"] for row in rows] == [1.5, 1.0, 2.0]
