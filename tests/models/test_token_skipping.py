"""Token skipping: which tokens pass, what the others get, what it costs, what it leaves alone."""

from __future__ import annotations

import copy
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dmoe_var import Oracle, Random, TokenSkipping, count_flops, generate
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.models.kv_cache import KVCache
from dmoe_var.models.token_skipping import ScaleSkipping, Skip
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import Threshold

LABELS = [0, 1, 2, 3]
SMALL = {"top_k": 20, "top_p": 0.9, "seed": 2}
RATIOS = (0.0, 0.0, 0.4, 0.5)
KEPT = (1, 4, 5, 8)  # of 1, 4, 9, 16
BY_DISTANCE, BY_ROUTER = (TokenSkipping(RATIOS, m, first_layer=1) for m in ("distance", "router"))


class Sees(Observer):
    def __init__(self):
        self.routed = []

    def on_routing(self, routed):
        self.routed.append(routed)


def largest(measures, num_kept):
    """Places of the largest measures, rising."""
    return sorted(sorted(range(len(measures)), key=lambda i: -measures[i])[:num_kept])


def area(out_lC, side, target):
    """Each cell of the larger map is the mean of the source's cells that it overlaps."""
    rows = []
    for i in range(target * target):
        spans = [range(p * side // target, -(-(p + 1) * side // target)) for p in divmod(i, target)]
        rows.append(torch.stack([out_lC[y * side + x] for y in spans[0] for x in spans[1]]).mean(0))
    return torch.stack(rows)


def far_from_mean(x_lC):
    return [float((x - x_lC.mean(0)).pow(2).sum()) for x in x_lC]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("measure", ["distance", "router"])
def test_a_block(dynamic, measure):
    """Against its equations in float64, row by row and token by token."""
    block, C, H = copy.deepcopy(dynamic.moe.blocks[1]).double(), 64, 2
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_RlC, mod, earlier = draw(2, 9, C), draw(2, 1, 6, C), draw(2, 2, 4, C)
    past_k, past_v = draw(2, 2, H, 3, C // H)
    cache = KVCache((2, 2, H, 20, C // H), like=x_RlC)
    cache.append(1, past_k, past_v)
    cache.advance(1, 3)
    outputs = {("attention", 1): earlier[0], ("ffn", 1): earlier[1]}
    skip = Skip(ScaleSkipping((2, 3), 5, 0, measure), outputs).at(1)
    found = block(x_RlC, mod, 1, cache=cache, routing=Routing(Threshold(0.5)), skip=skip)
    for row, x in enumerate(x_RlC):
        gamma1, gamma2, gain1, gain2, shift1, shift2 = mod[row, 0]
        kept = largest(far_from_mean(x), 5)
        h = (F.layer_norm(x, (C,), eps=1e-6) * gain1 + shift1)[kept]
        weight, attn = block.attn.mat_qkv.weight.view(3, H, C // H, C), block.attn
        heads = []
        for i in range(H):
            q = F.normalize(h @ weight[0, i].T + attn.q_bias.view(H, -1)[i], dim=-1)
            k = torch.cat([past_k[row, i], F.normalize(h @ weight[1, i].T, dim=-1)])
            v = torch.cat([past_v[row, i], h @ weight[2, i].T + attn.v_bias.view(H, -1)[i]])
            learnt = attn.scale_mul_1H11[0, i].clamp_max(math.log(100)).exp()
            heads.append((learnt * q @ k.T).softmax(-1) @ v)
        attended = area(earlier[0, row], 2, 3)
        attended[kept] = torch.cat(heads, dim=-1) @ attn.proj.weight.T + attn.proj.bias
        x = x + gamma1 * attended
        h = F.layer_norm(x, (C,), eps=1e-6) * gain2 + shift2
        ffn, router = block.ffn, block.ffn.router
        scores = (F.gelu(h @ router.fc1.weight.T) @ router.fc2.weight.T).abs()
        kept = largest(scores.sum(-1) if measure == "router" else far_from_mean(x), 5)
        fed = area(earlier[1, row], 2, 3)
        for i in kept:
            runs = [e for e, score in enumerate(scores[i]) if score >= 0.5 * scores[i].max()]
            hidden = [F.relu(ffn.w1_EDC[e] @ h[i] + ffn.b1_ED[e]) @ ffn.w2_EDC[e] for e in runs]
            fed[i] = sum(hidden) + ffn.b2_C
        assert_close(found[row], x + gamma2 * fed, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"tau": 0.5}, {"selection": Random(2)}], ids=str)
def test_none_skipped_is_the_plain_sampler(dynamic, vqvae, options):
    given = (None, TokenSkipping(), TokenSkipping((0.0,) * 4, first_layer=9), BY_DISTANCE)
    plain, *off, on = (
        generate(dynamic, vqvae, LABELS, skipping=each, **SMALL, **options) for each in given
    )
    assert all(torch.equal(plain, each) for each in off)
    assert (plain - on).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("skipping", "options"),
    [
        (BY_DISTANCE, {"cfg": (1.5, 1.5, 1.5, 0.0)}),
        (BY_DISTANCE, {"tau": 0.5, "share_mask": True, "impl": "grouped"}),
        (BY_DISTANCE, {"selection": Random(2)}),
        (BY_ROUTER, {"tau": 0.5, "cfg": (1.5, 1.5, 1.5, 0.0), "share_mask": True}),
    ],
    ids=str,
)
def test_an_image_is_the_same_in_any_batch(dynamic, vqvae, skipping, options, dtype):
    models = [copy.deepcopy(model).to(dtype) for model in (dynamic, vqvae)]
    options = {**SMALL, **options, "skipping": skipping}
    together = generate(*models, LABELS, **options)
    assert together.isfinite().all()
    if dtype == torch.float32:
        alone = [generate(*models, [c], start_index=i, **options) for i, c in enumerate(LABELS)]
        assert_close(torch.cat(alone), together, rtol=0, atol=1e-4)


@pytest.mark.parametrize("skipping", [BY_DISTANCE, BY_ROUTER], ids=["distance", "router"])
def test_both_halves_keep_the_same_tokens_if_they_share_a_mask(dynamic, vqvae, skipping):
    for share_mask in (True, False):
        sees = Sees()
        given = {"tau": 0.5, "share_mask": share_mask, "observer": sees, "skipping": skipping}
        generate(dynamic, vqvae, LABELS, **SMALL, **given)
        *_, last = sees.routed
        assert last.kept.num_tokens == 16
        assert (
            last.x_BLC.shape[:2] == last.mask_BLE.shape[:2] == last.kept.places_RK.shape == (8, 8)
        )
        assert_close(last.scores_bLE, last.ffn.router(last.x_BLC[: len(last.scores_bLE)]))
        assert torch.equal(*last.kept.places_RK.chunk(2)) == share_mask


def test_rows_that_guidance_drops_change_nothing(dynamic, vqvae):
    """1 + 1e-30 is 1, but both halves run."""
    given = {**SMALL, "tau": 0.5, "skipping": BY_DISTANCE}
    ends, never = ((1.5, 1.5, 1.5, last) for last in (0.0, 1e-30))
    images = [generate(dynamic, vqvae, LABELS, cfg, **given) for cfg in (ends, never)]
    assert_close(*images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("skipping", [BY_DISTANCE, BY_ROUTER], ids=["distance", "router"])
def test_flops(dynamic, vqvae, skipping):
    """By hand: two rows, layers 0 and 1, of which only the second skips."""
    report = count_flops(dynamic, vqvae, LABELS, tau=0.5, skipping=skipping, **SMALL)
    C, E, hidden = 64, 8, 8  # hidden: of a router
    passing = [(p * p, kept) for p, kept in zip((1, 2, 3, 4), KEPT, strict=True)]
    seen = [[sum(each[i] for each in passing[: si + 1]) for i in (0, 1)] for si in range(4)]
    macs, sums = report.fixed.macs, [2 * sum(each) for each in passing]
    assert macs["qkv_proj"] == tuple(4 * C * C * n for n in sums)
    products = [
        sum(a * b for a, b in zip(*of, strict=True)) for of in zip(passing, seen, strict=True)
    ]
    assert macs["attention"] == tuple(2 * 2 * C * n for n in products)
    assert macs["ffn"] == (8 * C * C * sums[0], 8 * C * C * sums[1], 0, 0)
    assert macs["head"] == tuple(2 * p * p * C * 32 for p in (1, 2, 3, 4))
    for si, cost in report.fixed.experts.items():
        assert cost.num_pairs == sums[si] * E
        assert set(report.ran.times_NSK[:, si - 2].sum(-1)) == {sums[si]}
        scored = 4 * passing[si][0] if skipping is BY_ROUTER else sums[si]
        assert report.score_macs[si] == scored * (C * hidden + hidden * E)
        assert 0 < report.expert_share[si] < 1
    plain = fixed_cost(dynamic, vqvae)
    assert plain.macs["adaln"] == macs["adaln"]


@pytest.mark.parametrize(
    ("skipping", "options", "message"),
    [
        (TokenSkipping((0.0, 0.5)), {}, "skipping.ratios=(0.0, 0.5) has 2 values; allowed: none"),
        (TokenSkipping((0.5,) * 4), {}, "skipping.ratios=(0.5, 0.5, 0.5, 0.5) must begin with 0"),
        (TokenSkipping(RATIOS, source=2), {}, "skipping.source=2 must be within 0..1"),
        (TokenSkipping(RATIOS), {}, "skipping.first_layer=3 must be within 0..1"),
        (BY_ROUTER, {}, "skipping.measure=router: no router runs at scale 2; allowed: distance"),
        (BY_ROUTER, {"selection": Oracle(0.5)}, "skipping.measure=router: no router runs at"),
        (0.5, {}, "skipping=0.5 must be a TokenSkipping or None"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(dynamic, vqvae, skipping, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        generate(dynamic, vqvae, LABELS, skipping=skipping, **options)


@pytest.mark.parametrize("fields", [{"ratios": (1.0,)}, {"measure": "norm"}, {"first_layer": -1}])
def test_fields_have_limits(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name}="):
        TokenSkipping(**fields)
