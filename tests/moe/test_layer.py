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
    outputs = [expert_output(ffn, x_BLC, e) for e in range(E)]
    return torch.stack([out_BLC.square().sum(-1).sqrt() for out_BLC in outputs], dim=-1)


def test_true_norms_leave_the_shared_bias_out(ffn, x_BLC):
    assert_close(ffn.true_norms(x_BLC), naive_norms(ffn, x_BLC), rtol=0, atol=1e-12)
    with torch.no_grad():
        before = ffn.true_norms(x_BLC)
        ffn.b2_C.add_(100)
        assert torch.equal(ffn.true_norms(x_BLC), before)


def test_true_norms_are_not_rounded_by_autocast(ffn, x_BLC):
    """Neurons whose outputs almost cancel leave a norm that half precision would lose."""
    with torch.no_grad():
        ffn.w1_EDC[:, 1], ffn.b1_ED[:, 1] = ffn.w1_EDC[:, 0], ffn.b1_ED[:, 0]
        ffn.w2_EDC[:, 1] = -ffn.w2_EDC[:, 0] * (1 + 2**-6)
        ffn.w1_EDC[:, 2:], ffn.b1_ED[:, 2:] = 0, 0
    expected = naive_norms(ffn, x_BLC)
    with torch.autocast("cpu", torch.bfloat16):
        found = ffn.float().true_norms(x_BLC.float())
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, rtol=0.02, atol=1e-3)


def naive_keys(ffn, x_BLC):
    """By the definition: x . the mean of an expert's fc1 rows."""
    keys = [sum(ffn.w1_EDC[e, d] for d in range(SIZE)) / SIZE for e in range(E)]
    return torch.stack([(x_BLC * key_C).sum(-1) for key_C in keys], dim=-1)


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
    "rule",
    [None, All(), Random(2), Oracle(0.4), Keys(0.4), Threshold(0.4), TopK(2), Cumulative(0.4)],
)
def test_the_router_runs_only_where_a_rule_reads_it(ffn, x_BLC, rule):
    calls = []
    ffn.router.register_forward_hook(lambda *_: calls.append(1))
    ffn(x_BLC, None if rule is None else Routing(rule))
    assert bool(calls) == (type(rule) in (Threshold, TopK, Cumulative))


def test_random_rules_take_the_noise_handed_down(ffn, x_BLC):
    noise_BLE = torch.rand(2, 5, E, generator=torch.Generator().manual_seed(2))
    asked = []

    def noise(*shape):
        asked.append(shape)
        return noise_BLE

    out = ffn(x_BLC, Routing(Random(2), noise=noise))
    assert asked == [(5, E)]
    assert_close(out, masked_sum(ffn, x_BLC, TopK(2)(noise_BLE)), rtol=0, atol=1e-12)


def test_counts_keep_scales_and_layers_apart():
    """960 experts, as the smallest published ones to a layer, are more than eight bits hold."""
    counts = ExpertCounts()
    masks = {si: torch.rand(2, 3, si + 1, 960) < 0.5 for si in (4, 2)}  # (layers, B, L, E)
    for layer in range(2):
        for si, mask in masks.items():
            counts.record(si, mask[layer])
    assert counts.scales == [2, 4]
    for si, mask in masks.items():
        assert torch.equal(counts.per_token(si), mask.sum(-1).short())
