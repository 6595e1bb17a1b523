"""The expert FFN: which experts a rule picks, what it costs to pick, and the routers' target."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import All, Cumulative, Oracle, Random, Threshold, TopK
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.layer import ExpertConfig, MoEFFN
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import Keys

WIDTH, HIDDEN, SIZE = 16, 24, 4
E = HIDDEN // SIZE


@pytest.fixture
def ffn():
    torch.manual_seed(0)
    ffn = MoEFFN(WIDTH, HIDDEN, "relu", ExpertConfig(SIZE)).double()
    for name, parameter in ffn.named_parameters():
        if "router" not in name:
            torch.nn.init.normal_(parameter)
    return ffn


@pytest.fixture
def x_BLC():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator)


def expert_output(ffn, x_BLC, e):
    """Without the shared bias."""
    h_BLD = (x_BLC @ ffn.w1_EDC[e].T + ffn.b1_ED[e]).clamp_min(0)
    return h_BLD @ ffn.w2_EDC[e]


def masked_sum(ffn, x_BLC, mask_BLE):
    outputs = [expert_output(ffn, x_BLC, e) * mask_BLE[..., e, None] for e in range(E)]
    return sum(outputs) + ffn.b2_C


def naive_norms(ffn, x_BLC):
    norms_BLE = torch.zeros(*x_BLC.shape[:-1], E, dtype=x_BLC.dtype)
    for e in range(E):
        norms_BLE[..., e] = expert_output(ffn, x_BLC, e).square().sum(-1).sqrt()
    return norms_BLE


def test_true_norms_leave_the_shared_bias_out(ffn, x_BLC):
    assert_close(ffn.true_norms(x_BLC), naive_norms(ffn, x_BLC), rtol=0, atol=1e-12)
    with torch.no_grad():
        before = ffn.true_norms(x_BLC)
        ffn.b2_C.add_(100)
        assert torch.equal(ffn.true_norms(x_BLC), before)


def naive_keys(ffn, x_BLC):
    """By the definition: x . the mean of an expert's fc1 rows."""
    scores_BLE = torch.zeros(*x_BLC.shape[:-1], E, dtype=x_BLC.dtype)
    for e in range(E):
        key_C = sum(ffn.w1_EDC[e, d] for d in range(SIZE)) / SIZE
        scores_BLE[..., e] = (x_BLC * key_C).sum(-1)
    return scores_BLE


def scores_of(rule, ffn, x_BLC):
    if isinstance(rule, Oracle):
        return naive_norms(ffn, x_BLC)
    return naive_keys(ffn, x_BLC) if isinstance(rule, Keys) else ffn.router(x_BLC)


def test_keys(ffn, x_BLC):
    """In float64, with a sign, and in float32 and bfloat16 to their precision."""
    expected = naive_keys(ffn, x_BLC)
    assert_close(Keys(0.5).scores(ffn, x_BLC), expected, rtol=0, atol=1e-12)
    assert (expected < 0).any()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        found = Keys(0.5).scores(ffn.to(dtype), x_BLC.to(dtype))
        assert found.dtype == dtype
        assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", "grouped"])
@pytest.mark.parametrize(
    "rule",
    [Threshold(0.4), TopK(2), Cumulative(0.6), Oracle(0.4), Random(2), All(), Keys(0.4), Keys(0)],
    ids=repr,
)
def test_experts_run_as_the_rule_says(ffn, x_BLC, rule, impl):
    mask_BLE = rule(scores_of(rule, ffn, x_BLC))
    assert mask_BLE.any(-1).all()
    assert mask_BLE.all() == (rule in (All(), Keys(0)))
    counts = ExpertCounts()
    out = ffn(x_BLC, Routing(rule, 3, impl, counts))
    assert_close(out, masked_sum(ffn, x_BLC, mask_BLE), rtol=0, atol=1e-12)
    assert counts.scales == [3]
    assert torch.equal(counts.per_token(3), mask_BLE.sum(-1)[None].short())


@pytest.mark.parametrize("rule", [Threshold(0.4), Oracle(0.4), Random(2), Keys(0.4)], ids=repr)
def test_rows_that_share_a_mask(ffn, rule):
    """The first half selects, for both; the router and the noise see no other."""
    x_BLC = torch.randn(
        4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    noise_BLE = torch.rand(2, 5, E, generator=torch.Generator().manual_seed(3))
    mask_BLE = torch.cat([rule(scores_of(rule, ffn, x_BLC[:2]), noise_BLE)] * 2)
    seen, counts = [], ExpertCounts()
    ffn.router.register_forward_hook(lambda _, given, out: seen.append(len(out)))
    out = ffn(x_BLC, Routing(rule, 3, "grouped", counts, lambda *_: noise_BLE, sharing=2))
    assert_close(out, masked_sum(ffn, x_BLC, mask_BLE), rtol=0, atol=1e-12)
    assert torch.equal(counts.per_token(3), mask_BLE.sum(-1)[None].short())
    assert seen == ([2] if rule == Threshold(0.4) else [])


def test_without_routing_every_expert_runs(ffn, x_BLC):
    expected = masked_sum(ffn, x_BLC, torch.ones(2, 5, E))
    assert_close(ffn(x_BLC), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("routing", "runs"),
    [
        (None, False),
        (Routing(All()), False),
        (Routing(Random(2)), False),
        (Routing(Oracle(0.4)), False),
        (Routing(Keys(0.4)), False),
        (Routing(Threshold(0.4)), True),
        (Routing(TopK(2)), True),
        (Routing(Cumulative(0.4)), True),
    ],
    ids=lambda value: repr(getattr(value, "rule", value)),
)
def test_the_router_runs_only_where_a_rule_reads_it(ffn, x_BLC, routing, runs):
    calls = []
    ffn.router.register_forward_hook(lambda *_: calls.append(1))
    ffn(x_BLC, routing)
    assert bool(calls) == runs


def test_random_rules_take_the_noise_handed_down(ffn, x_BLC):
    noise_BLE = torch.rand(2, 5, E, generator=torch.Generator().manual_seed(2))
    asked = []

    def noise(*shape):
        asked.append(shape)
        return noise_BLE

    out = ffn(x_BLC, Routing(Random(2), noise=noise))
    assert asked == [(5, E)]
    assert_close(out, masked_sum(ffn, x_BLC, TopK(2)(noise_BLE)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [Threshold(0.4), All()], ids=repr)
def test_unknown_impl_raises_whatever_the_rule(ffn, x_BLC, rule):
    with pytest.raises(ValueError, match="impl='fast'"):
        ffn(x_BLC, Routing(rule, impl="fast"))


def test_counts_keep_scales_and_layers_apart():
    counts = ExpertCounts()
    masks = {si: torch.rand(2, 3, si + 1, E) < 0.5 for si in (4, 2)}  # (layers, B, L, E)
    for layer in range(2):
        for si, mask in masks.items():
            counts.record(si, mask[layer])
    assert counts.scales == [2, 4]
    for si, mask in masks.items():
        assert torch.equal(counts.per_token(si), mask.sum(-1).short())


def test_counts_of_many_experts():
    """More than eight bits hold; the smallest published experts are 8 wide, 960 to a layer."""
    counts = ExpertCounts()
    counts.record(0, torch.ones(1, 2, 960, dtype=torch.bool))
    assert counts.per_token(0).tolist() == [[[960, 960]]]
