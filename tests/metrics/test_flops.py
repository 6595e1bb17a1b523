"""FLOPs of models: equal to closed forms and to PyTorch's own counter over whole runs."""

from __future__ import annotations

import copy
import math
import re
import warnings
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmoe_var import (
    All,
    Cumulative,
    DynamicVAR,
    Oracle,
    Random,
    TopK,
    build_models,
    convert_to_moe,
    generate,
)
from dmoe_var.conversion.pruning import prune
from dmoe_var.metrics.flops import SAMPLER_PARTS, count_flops, report
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.metrics.flops_ops import count_macs
from dmoe_var.models.vqvae import PATCH_NUMS_256, VQVAEConfig
from dmoe_var.moe.counts import ExpertHistogram
from dmoe_var.moe.selection import Keys, SelectionRule

PATCH_NUMS = (1, 2, 4)
DEPTH, WIDTH, VOCAB, LATENT = 2, 32, 16, 8
EXPERT_SIZE, ROUTER_HIDDEN = 32, 5
NUM_EXPERTS = 4 * WIDTH // EXPERT_SIZE
MINI_VQVAE = VQVAEConfig(
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    z_channels=LATENT,
    vocab_size=VOCAB,
    patch_nums=PATCH_NUMS,
)


# Closed forms, MACs an image, from the shapes alone.


def sampler_macs(depth, width, vocab, patch_nums, rows, shared_adaln=False):
    """By part, a value a scale; AdaLN's is that of one run."""
    tokens = [p * p for p in patch_nums]
    keys = list(accumulate(tokens))
    return {
        "qkv_proj": [rows * depth * n * 4 * width**2 for n in tokens],
        "attention": [rows * depth * 2 * n * k * width for n, k in zip(tokens, keys, strict=True)],
        "ffn": [rows * depth * n * 8 * width**2 for n in tokens],
        "head": [rows * n * width * vocab for n in tokens],
        "adaln": rows * (1 if shared_adaln else depth) * 6 * width**2,
    }


def other_macs(width, latent, patch_nums, rows, adaln_runs):
    """word_embed on the conditional branch's tokens, phi at every scale, the head norm."""
    words = sum(p * p for p in patch_nums[1:]) * latent * width
    phi = len(patch_nums) * 9 * latent**2 * patch_nums[-1] ** 2
    return words + phi + adaln_runs * rows * 2 * width**2


def decoder_macs(config):
    def conv(c_in, c_out, side, kernel=3):
        return c_in * c_out * kernel**2 * side**2

    def residual(c_in, c_out, side):
        shortcut = conv(c_in, c_out, side, 1) if c_in != c_out else 0
        return conv(c_in, c_out, side) + conv(c_out, c_out, side) + shortcut

    def attention(channels, side):
        return conv(channels, 4 * channels, side, 1) + 2 * side**4 * channels

    side, z = config.patch_nums[-1], config.z_channels
    channels = config.ch * config.ch_mult[-1]
    macs = conv(z, z, side) + conv(z, channels, side)
    macs += 2 * residual(channels, channels, side) + attention(channels, side)
    for level, mult in reversed(list(enumerate(config.ch_mult))):
        for _ in range(config.num_res_blocks + 1):
            macs += residual(channels, config.ch * mult, side)
            channels = config.ch * mult
            if level == len(config.ch_mult) - 1:
                macs += attention(channels, side)
        if level:
            side *= 2
            macs += conv(channels, channels, side)
    return macs + conv(channels, 3, side)


# Models


def mini(seed=0, **overrides):
    torch.manual_seed(seed)
    shape = {"depth": DEPTH, "width": WIDTH, "num_heads": 2, "num_classes": 5, **overrides}
    vqvae, var = build_models(vqvae=MINI_VQVAE, **shape)
    return vqvae.eval(), var.eval()


def to_moe(var):
    neurons = torch.arange(4 * WIDTH) % NUM_EXPERTS
    return convert_to_moe(var, EXPERT_SIZE, router_hidden=ROUTER_HIDDEN, labels=[neurons] * DEPTH)


@pytest.fixture(scope="module")
def vqvae():
    return mini()[0]


@pytest.fixture(scope="module")
def dense():
    return mini()[1]


@pytest.fixture(scope="module")
def moe(dense):
    return to_moe(dense)


def dynamic(dense, moe, scales):
    return DynamicVAR(dense, moe, scales)


def router_macs(tokens, rows):
    return rows * DEPTH * tokens * (WIDTH * ROUTER_HIDDEN + ROUTER_HIDDEN * NUM_EXPERTS)


# Fixed parts


def test_the_closed_form_is_the_published_one():
    """What the other tests compare with gives the paper sheet's d16 and d30, to its digits."""
    d16 = sampler_macs(16, 1024, 4096, PATCH_NUMS_256, rows=2)
    sums = {part: np.sum(macs) / 1e9 for part, macs in d16.items()}
    assert {part: round(gmac, 2) for part, gmac in sums.items()} == {
        "qkv_proj": 91.27, "attention": 18.77, "ffn": 182.54, "head": 5.70, "adaln": 0.20,
    }  # fmt: skip
    assert round(sum(sums.values()), 2) == 298.48
    assert round(sum(sums.values()) + 9 * sums["adaln"], 2) == 300.29
    assert round(sum(d16["ffn"][-3:]) / 1e9, 2) == 140.93
    d30 = sampler_macs(30, 1920, 4096, PATCH_NUMS_256, rows=2)
    assert round(sum(np.sum(macs) for macs in d30.values()) / 1e9 + 9 * 1.3271, 2) == 1894.82
    assert round(decoder_macs(VQVAEConfig()) / 1e9, 1) == 196.9


@pytest.mark.parametrize(
    ("overrides", "every_scale", "cfg"),
    [
        ({}, False, 1.5),
        ({}, True, 0),
        ({"shared_adaln": True}, True, 1.5),
        ({"patch_nums": (2, 3, 6)}, True, 1.5),
    ],
    ids=str,
)
def test_dense_parts_equal_the_closed_form(overrides, every_scale, cfg):
    vqvae, var = mini(**overrides)
    patch_nums, rows = var.config.patch_nums, 2 if cfg else 1
    expected = sampler_macs(
        DEPTH, WIDTH, VOCAB, patch_nums, rows, overrides.get("shared_adaln", False)
    )
    runs = 3 if every_scale else 1
    once = expected.pop("adaln")

    flops = count_flops(var, vqvae, [0, 1], cfg=cfg, adaln_every_scale=every_scale)

    macs = flops.fixed.macs
    assert {part: list(macs[part]) for part in expected} == expected
    assert macs["adaln"] == ((once,) * 3 if every_scale else (once, 0, 0))
    assert sum(macs["other"]) == other_macs(WIDTH, LATENT, patch_nums, rows, runs)
    assert flops.fixed.decoder_macs == decoder_macs(vqvae.config)
    total = sum(map(sum, expected.values())) + runs * once
    assert flops.total_gmac == pytest.approx(total / 1e9, rel=1e-12)
    assert flops.total_gmac_std == 0
    assert flops.by_part_gmac["experts"] == flops.by_part_gmac["router"] == 0
    assert flops.expert_share == {}


@pytest.mark.parametrize(("tuned", "runs"), [(False, 1), (True, 2)])
def test_modulations_of_a_dynamic_model(vqvae, dense, moe, tuned, runs):
    """Each backbone projects the class once, at the first scale that it runs, unless another has
    done so with the same weights."""
    if tuned:
        moe = copy.deepcopy(moe)
        with torch.no_grad():
            moe.blocks[0].ada_lin[1].weight.mul_(2)
    fixed = fixed_cost(dynamic(dense, moe, (1, 2)), vqvae)
    once = 2 * DEPTH * 6 * WIDTH**2
    assert fixed.macs["adaln"] == (once, once * (runs - 1), 0)
    assert sum(fixed.macs["other"]) == other_macs(WIDTH, LATENT, PATCH_NUMS, 2, adaln_runs=runs)


@pytest.mark.slow
def test_published_d16():
    """The paper sheet's numbers to its digits, from the real model (it takes about 3 GB)."""
    vqvae, var = build_models(16)
    once = count_flops(var, vqvae, [0])
    every = fixed_cost(var, vqvae, adaln_every_scale=True)
    gmac = {part: round(value, 2) for part, value in once.by_part_gmac.items()}
    assert gmac == {
        "qkv_proj": 91.27, "attention": 18.77, "ffn": 182.54, "experts": 0, "router": 0,
        "head": 5.70, "adaln": 0.20, "other": 0.05, "decoder": 196.86,
    }  # fmt: skip
    assert round(once.total_gmac, 2) == 298.48
    assert once.fixed.decoder_macs == decoder_macs(vqvae.config)
    assert round(sum(every.macs["adaln"]) / 1e9, 2) == 2.01
    published = report(every, ExpertHistogram.none(1), {})
    assert round(published.total_gmac, 2) == 300.29
    assert round(sum(published.by_part_and_scale_gmac["ffn"][-3:]), 2) == 140.93
    assert once.fixed.macs["ffn"] == tuple(sampler_macs(16, 1024, 4096, PATCH_NUMS_256, 2)["ffn"])


# Experts


@pytest.mark.parametrize(
    ("rule", "experts_run", "router_runs", "cfg"),
    [
        (All(), NUM_EXPERTS, False, 1.5),
        (TopK(1), 1, True, 1.5),
        (TopK(3), 3, True, 0),
        (Random(2), 2, False, 0),
    ],
)
def test_experts_of_one_scale_in_the_middle(vqvae, dense, moe, rule, experts_run, router_runs, cfg):
    rows, tokens = (2 if cfg else 1), PATCH_NUMS[1] ** 2
    flops = count_flops(dynamic(dense, moe, (1,)), vqvae, [0, 1, 2], cfg=cfg, selection=rule)

    parts = flops.by_part_and_scale_gmac
    pairs = rows * DEPTH * tokens * experts_run
    assert flops.pairs == {1: (pairs,) * 3}
    assert parts["experts"] == (0, pairs * 2 * WIDTH * EXPERT_SIZE / 1e9, 0)
    assert parts["router"] == (0, router_runs * router_macs(tokens, rows) / 1e9, 0)
    expected = sampler_macs(DEPTH, WIDTH, VOCAB, PATCH_NUMS, rows)
    assert flops.fixed.macs["ffn"] == (expected["ffn"][0], 0, expected["ffn"][2])
    assert list(flops.fixed.macs["attention"]) == expected["attention"]
    assert flops.expert_share == {1: experts_run / NUM_EXPERTS}
    assert flops.total_gmac_std == 0


def test_without_a_rule_every_expert_runs_and_no_router(vqvae, dense, moe):
    """The expert model then costs what the dense one does."""
    expected = sampler_macs(DEPTH, WIDTH, VOCAB, PATCH_NUMS, rows=2)
    flops = count_flops(moe, vqvae, [0, 1])
    assert sum(flops.fixed.macs["ffn"]) == 0
    assert flops.by_part_and_scale_gmac["experts"] == pytest.approx(
        [macs / 1e9 for macs in expected["ffn"]], rel=1e-12
    )
    assert flops.by_part_gmac["router"] == 0
    assert flops.expert_share == {0: 1, 1: 1, 2: 1}
    assert flops.total_gmac == pytest.approx(count_flops(dense, vqvae, [0]).total_gmac, rel=1e-12)
    assert flops.authors_gmac == pytest.approx(flops.total_gmac, rel=1e-12)
    with_all = count_flops(moe, vqvae, [0, 1], selection=All())
    assert with_all.authors_gmac == pytest.approx(flops.total_gmac, rel=1e-12)


def test_rules_of_each_scale_decide_where_the_router_counts(vqvae, dense, moe):
    """An oracle needs no router, and its own pass over the true norms is left out."""
    rules = [TopK(1), Oracle(0.0), Random(1)]
    flops = count_flops(moe, vqvae, [0], selection=rules)
    assert flops.score_macs == {0: router_macs(1, 2), 1: 0, 2: 0}
    assert flops.by_part_and_scale_gmac["router"] == (router_macs(1, 2) / 1e9, 0, 0)
    assert flops.expert_share == {0: 1 / NUM_EXPERTS, 1: 1, 2: 1 / NUM_EXPERTS}
    everything = sampler_macs(DEPTH, WIDTH, VOCAB, PATCH_NUMS, rows=2)["ffn"]
    assert flops.by_part_and_scale_gmac["experts"][1] == everything[1] / 1e9


def test_keys_cost_a_product_of_the_width_an_expert(vqvae, dense, moe):
    """In the place of the router, and of half of the rows where they share their masks."""
    tokens = PATCH_NUMS[1] ** 2
    for shared, selecting in ((False, 2), (True, 1)):
        flops = count_flops(
            dynamic(dense, moe, (1,)), vqvae, [0, 1], selection=Keys(0.5), share_mask=shared
        )
        macs = DEPTH * selecting * tokens * NUM_EXPERTS * WIDTH
        assert flops.by_part_and_scale_gmac["router"] == (0, macs / 1e9, 0)
        x_BLC = torch.zeros(selecting, tokens, WIDTH)
        ffns = {str(i): block.ffn for i, block in enumerate(moe.blocks)}
        traced = count_macs(
            lambda x, ffns=ffns: tuple(Keys(0.5).scores(ffn, x) for ffn in ffns.values()),
            (x_BLC,),
            ffns,
        )
        assert traced[""].total() == macs


@dataclass(frozen=True)
class Given(SelectionRule):
    """Experts e < (t + row) % 5 of token t: a mask that is known, a row with none included."""

    def __call__(self, scores, noise=None):
        rows, tokens, num_experts = scores.shape
        number = (torch.arange(tokens) + torch.arange(rows)[:, None]) % (num_experts + 1)
        return torch.arange(num_experts) < number[..., None]


def test_a_given_mask_costs_the_closed_form(vqvae, dense, moe):
    """By hand: of 3 images, rows 0..2 are the conditional, 3..5 the unconditional branches; layers
    have the same mask."""
    flops = count_flops(dynamic(dense, moe, (1, 2)), vqvae, [0, 1, 2], selection=Given())
    counted, charged, macs = [], [], np.zeros(3)
    for side in PATCH_NUMS[1:]:
        ran = [[(t + row) % 5 for t in range(side**2)] for row in range(6)]
        pairs = [DEPTH * (sum(ran[i]) + sum(ran[i + 3])) for i in range(3)]
        theirs = [
            DEPTH * sum(a / (1 + 0.1 * math.log10(4 - a + 1)) for a in ran[i] + ran[i + 3])
            for i in range(3)
        ]
        counted.append(tuple(pairs))
        charged.append(theirs)
        macs += np.array(pairs) * 2 * WIDTH * EXPERT_SIZE
    assert flops.pairs == {1: counted[0], 2: counted[1]}
    assert flops.charged == {si: pytest.approx(charged[si - 1], rel=1e-12) for si in (1, 2)}

    closed = sampler_macs(DEPTH, WIDTH, VOCAB, PATCH_NUMS, rows=2)
    fixed = sum(sum(closed[part]) for part in ("qkv_proj", "attention", "head"))
    fixed += closed["ffn"][0] + closed["adaln"]  # both backbones have the same
    fixed += sum(router_macs(side**2, rows=2) for side in PATCH_NUMS[1:])
    expected = (fixed + macs) / 1e9
    assert flops.gmac_per_image == pytest.approx(expected, rel=1e-12)
    assert flops.total_gmac == pytest.approx(expected.mean(), rel=1e-12)
    assert flops.total_gmac_std == pytest.approx(expected.std(), rel=1e-9)
    theirs = fixed + np.sum(charged, axis=0).mean() * 2 * WIDTH * EXPERT_SIZE
    assert flops.authors_gmac == pytest.approx(theirs / 1e9, rel=1e-12)
    assert flops.authors_gmac < flops.total_gmac
    decoder = decoder_macs(vqvae.config) / 1e9
    assert flops.decoder_gmac == pytest.approx(decoder, rel=1e-12)
    metrics = flops.metrics()
    assert metrics["flops_with_decoder_gmac"] == pytest.approx(expected.mean() + decoder, rel=1e-12)
    assert metrics["flops_gmac_authors"] == flops.authors_gmac
    assert metrics["flops_gmac_min"] == pytest.approx(expected.min(), rel=1e-12)
    assert metrics["flops_gmac_max"] == pytest.approx(expected.max(), rel=1e-12)


def test_a_pruned_model_costs_its_narrower_ffns(vqvae, dense):
    hidden, scales, share = 4 * WIDTH, (1, 2), 0.3
    pruned = prune(dense, share, [torch.rand(hidden) for _ in range(DEPTH)])
    flops = count_flops(DynamicVAR(dense, pruned, scales), vqvae, [0])
    kept = hidden - int(hidden * share)
    ffn = [2 * DEPTH * p * p * 2 * WIDTH * (kept if si else hidden)
           for si, p in enumerate(PATCH_NUMS)]  # fmt: skip
    assert list(flops.fixed.macs["ffn"]) == ffn
    assert flops.pairs == {}
    closed = sampler_macs(DEPTH, WIDTH, VOCAB, PATCH_NUMS, rows=2)
    rest = sum(sum(closed[part]) for part in ("qkv_proj", "attention", "head"))
    total = sum(ffn) + rest + closed["adaln"]
    assert flops.total_gmac == pytest.approx(total / 1e9, rel=1e-12)


# Against PyTorch's own counter, over whole runs of the sampler


class Sampler(nn.Module):
    """`generate` as a module, so that PyTorch's counter knows its parts by their names."""

    def __init__(self, model, vqvae):
        super().__init__()
        self.model, self.vqvae = model, vqvae

    def forward(self, labels, **options):
        return generate(self.model, self.vqvae, labels, **options)


def pytorch_parts(counter):
    """MACs by our names of the parts, from the counter's modules and operators."""
    found = dict.fromkeys((*SAMPLER_PARTS, "other", "decoder"), 0)
    own = {name: dict(counts) for name, counts in counter.get_flop_counts().items()}
    for name, counts in own.items():
        inner = [other for other in own if other.startswith(f"{name}.") or name == "Global"]
        inner = [o for o in inner if o != name and not any(o.startswith(f"{p}.") for p in inner)]
        for operator, flops in counts.items():
            flops -= sum(own[other].get(operator, 0) for other in inner)
            found[part_of(name, operator)] += flops // 2
    return found


def part_of(name, operator):
    if ".attn" in name and name.startswith("Sampler.model"):
        return "attention" if "bmm" in str(operator) else "qkv_proj"
    for part, pattern in (
        ("other", r"\.(word_embed|head_nm)(\.|$)|\.vqvae\.quantize"),
        ("decoder", r"\.vqvae\."),
        ("router", r"\.ffn\.router(\.|$)"),
        ("adaln", r"\.(shared_ada_lin|ada_lin)(\.|$)"),
        ("head", r"\.head$"),
        ("experts", r"\.moe\.blocks\.\d+\.ffn$"),
        ("ffn", r"\.blocks\.\d+\.ffn(\.fc\d)?$"),
    ):
        if re.search(pattern, name):
            return part
    return "other"


@pytest.mark.parametrize(
    ("options", "shared_adaln"),
    [
        ({}, True),
        ({"cfg": 0, "adaln_every_scale": True}, False),
        ({"more_smooth": True}, False),
        ({"tau": [0.4, 0.6]}, True),
        ({"tau": [0.4, 0.6], "share_mask": True}, False),
        ({"tau": 0.5, "share_mask": True, "cfg": 0}, False),
        ({"selection": Given()}, False),
        ({"selection": Random(3), "cfg": 0, "adaln_every_scale": True}, True),
        ({"selection": Cumulative(0.7), "more_smooth": True}, False),
    ],
    ids=str,
)
def test_every_part_is_what_pytorch_counts(options, shared_adaln):
    vqvae, dense = mini(shared_adaln=shared_adaln)
    routed = "tau" in options or "selection" in options
    model = dynamic(dense, to_moe(dense), (0, 2)) if routed else dense
    labels = [0, 4, 1]
    flops = count_flops(model, vqvae, labels, impl="grouped", **options)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Sampler(model, vqvae)(labels, impl="grouped", **options)
    theirs = pytorch_parts(counter)
    ours = {part: gmac * 1e9 * len(labels) for part, gmac in flops.by_part_gmac.items()}
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert 2 * sum(theirs.values()) == counter.get_total_flops()
    assert sum(ours.values()) == pytest.approx(
        len(labels) * 1e9 * flops.total_gmac + ours["other"] + ours["decoder"], rel=1e-12
    )
    assert (theirs["experts"] > 0) == routed
    if "tau" in options:
        assert 0 < flops.expert_share[2] < 1


# Options


def test_batches_and_start_index_do_not_change_what_is_counted(vqvae, dense, moe):
    model, labels = dynamic(dense, moe, (1, 2)), torch.tensor([0, 1, 2, 3, 4])
    options = {"tau": 0.5, "top_k": 0, "seed": 3}
    whole = count_flops(model, vqvae, labels, **options)
    assert len(set(whole.experts_gmac_per_image)) > 2
    assert count_flops(model, vqvae, labels, batch_size=2, **options) == whole
    rest = count_flops(model, vqvae, labels[2:], batch_size=2, start_index=2, **options)
    assert rest.pairs == {si: pairs[2:] for si, pairs in whole.pairs.items()}
    other_seed = count_flops(model, vqvae, labels, **{**options, "seed": 4})
    assert other_seed.pairs != whole.pairs


@pytest.mark.parametrize(
    ("options", "error"),
    [({"topk": 3}, TypeError), ({"tau": 0.5}, ValueError), ({"labels": [9]}, ValueError)],
)
def test_a_dense_model_refuses_what_generate_refuses(vqvae, dense, options, error):
    """No image is sampled there, and still no wrong option passes."""
    with pytest.raises(error):
        count_flops(dense, vqvae, **{"labels": [0], **options})


@pytest.mark.parametrize("mode", ["float64", "train", "inference_mode"])
def test_neither_dtype_nor_mode_changes_the_cost_or_warns(vqvae, dense, mode):
    expected = fixed_cost(dense, vqvae)
    mini_vqvae, var = mini()
    if mode == "float64":
        mini_vqvae, var = mini_vqvae.double(), var.double()
    elif mode == "train":
        var.train()
    with warnings.catch_warnings(), torch.inference_mode(mode == "inference_mode"):
        warnings.simplefilter("error")
        assert fixed_cost(var, mini_vqvae) == expected


@pytest.mark.gpu
def test_on_a_gpu_the_cost_is_the_same(vqvae, dense, moe):
    expected = count_flops(dynamic(dense, moe, (1,)), vqvae, [0, 1], selection=TopK(1))
    gpu_vqvae, var = mini()
    model = dynamic(var, to_moe(var), (1,)).cuda()
    assert count_flops(model, gpu_vqvae.cuda(), [0, 1], selection=TopK(1)) == expected
