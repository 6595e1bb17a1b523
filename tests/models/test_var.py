"""The dense VAR: the published code's logits and sizes, loops in float64, train-only randomness."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import VAR, VARConfig
from dmoe_var.models.blocks import DropPath, Rows, SelfAttention
from dmoe_var.moe.layer import ExpertConfig


@torch.no_grad()
def test_logits_are_the_published_ones(parity):
    logits = parity.var(parity.io["label"], parity.io["teacher_input"])
    assert_close(logits, parity.io["logits"], rtol=0, atol=1e-4)


# Shape


@pytest.mark.parametrize(
    ("depth", "millions", "within"),
    [(16, 310.28, 0.005), (20, 600.92, 0.005), (24, 1033, 0.5), (30, 2010, 0.5)],
)
def test_published_sizes(depth, millions, within):
    with torch.device("meta"):
        var = VAR(VARConfig(depth=depth))
    assert sum(p.numel() for p in var.parameters()) / 1e6 == pytest.approx(millions, abs=within)


def test_depth_derives_the_rest():
    config = VARConfig(depth=20)
    assert (config.width, config.num_heads, config.hidden) == (1280, 20, 5120)
    assert config.drop_path == pytest.approx(0.1 * 20 / 24)
    assert config.num_tokens == 680
    gains = [VARConfig(depth=d).adaln_gamma_gain for d in (16, 20, 24, 30, 36)]
    assert gains == [1e-3, 1e-3, 1e-4, 1e-5, 5e-6]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"width": 64, "num_heads": 3}, "num_heads=3"),
        ({"experts": ExpertConfig(expert_size=100)}, "expert_size=100"),
    ],
)
def test_shapes_that_do_not_divide_raise(fields, name):
    with pytest.raises(ValueError, match=name):
        VARConfig(**fields)


def test_teacher_input_of_another_length_raises(make_var, make_teacher):
    var = make_var()
    with pytest.raises(ValueError, match=r"teacher_BLC must be \(2, 29, 8\)"):
        var(torch.tensor([0, 1]), make_teacher(var)[:, 1:])


# Initialisation as published


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_initialisation(shared_adaln):
    torch.manual_seed(0)
    fields = {"patch_nums": (1, 2), "vocab_size": 64, "num_classes": 9}
    depth, C = 3, 192
    var = VAR(VARConfig(depth=depth, shared_adaln=shared_adaln, adaln_gamma_gain=1e-3, **fields))
    std, out_std = (1 / C / 3) ** 0.5, (1 / C / 3 / (2 * depth)) ** 0.5
    block = var.blocks[1]
    expected = [
        (block.attn.mat_qkv.weight, std),
        (block.ffn.fc1.weight, std),
        (var.word_embed.weight, std),
        (var.class_emb.weight, std),
        (var.pos_1LC, std),
        (block.attn.proj.weight, out_std),
        (block.ffn.fc2.weight, out_std),
        (var.head.weight, 0.02 * std),
        (var.head_nm.ada_lin[1].weight, 0.5 * std),
    ]
    if shared_adaln:
        expected += [
            (var.shared_ada_lin[1].weight, std),
            (block.ada_gss[:, :, :2], 1e-3 * C**-0.5),
            (block.ada_gss[:, :, 2:], 0.5 * C**-0.5),
        ]
    else:
        expected += [
            (block.ada_lin[1].weight[: 2 * C], 1e-3 * std),
            (block.ada_lin[1].weight[2 * C :], 0.5 * std),
        ]
    for weight, wanted in expected:
        tolerance = 4 / weight.numel() ** 0.5  # six standard errors of a standard deviation
        assert weight.std().item() == pytest.approx(wanted, rel=tolerance)
    biases = [p for name, p in var.named_parameters() if "bias" in name]
    assert biases
    assert not any(bias.any() for bias in biases)
    assert_close(block.attn.scale_mul_1H11, torch.full((1, 3, 1, 1), math.log(4)))


def test_experts_start_as_the_ffn_that_they_cut():
    torch.manual_seed(0)
    fields = {"patch_nums": (1, 2), "vocab_size": 64, "num_classes": 9, "depth": 3}
    ffn = VAR(VARConfig(experts=ExpertConfig(96), **fields)).blocks[1].ffn
    std = (1 / 192 / 3) ** 0.5
    assert ffn.w1_EDC.std().item() == pytest.approx(std, rel=0.02)
    assert ffn.w2_EDC.std().item() == pytest.approx(std / (2 * 3) ** 0.5, rel=0.02)
    assert not ffn.b1_ED.any()
    assert not ffn.b2_C.any()


# Attention, by loops


def test_attention_without_l2_norm_by_loops():
    """With it, and the rest of a block, see tests/moe/test_equations.py."""
    torch.manual_seed(0)
    width, heads, length = 24, 3, 5
    dim = width // heads
    attn = SelfAttention(width, heads, l2_norm=False).double()
    for bias in (attn.q_bias, attn.v_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(2, length, width, dtype=torch.float64)
    level = torch.tensor([0, 1, 1, 2, 2])
    mask = torch.zeros(length, length).masked_fill(level[:, None] < level[None], -torch.inf)

    q, k, v = (x @ w.T for w in attn.mat_qkv.weight.chunk(3))
    q, v = q + attn.q_bias, v + attn.v_bias
    h = torch.zeros_like(x)
    for b, head, i in product(range(2), range(heads), range(length)):
        part = slice(head * dim, (head + 1) * dim)
        seen = [j for j in range(length) if level[j] <= level[i]]
        scores = [0.25 / math.sqrt(dim) * q[b, i, part] @ k[b, j, part] for j in seen]
        weights = torch.stack(scores).softmax(0)
        h[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, seen, strict=True))
    expected = attn.proj(h)
    assert_close(attn(x, 0, mask[None, None], None), expected, rtol=0, atol=1e-12)


# Random in train mode, and only there


def test_share_of_dropped_labels(make_var):
    var, labels = make_var(label_drop=0.1), torch.zeros(20000, dtype=torch.long)
    assert torch.equal(var.drop_labels(labels), labels)
    torch.manual_seed(0)
    dropped = var.train().drop_labels(labels)
    assert set(dropped.unique().tolist()) == {0, 5}
    assert (dropped == 5).float().mean().item() == pytest.approx(0.1, abs=0.01)


@torch.no_grad()
def test_residual_branches_are_dropped_in_train_mode_only(make_var, make_teacher):
    var = make_var(label_drop=0.0, drop_path=0.5)
    inputs = torch.tensor([1, 4]), make_teacher(var)
    assert torch.equal(var(*inputs), var(*inputs))
    assert torch.equal(var(*inputs, Rows(3, 9)), var(*inputs))
    torch.manual_seed(0)
    var.train()
    assert not torch.equal(var(*inputs), var(*inputs))


def test_drop_path_rises_over_the_blocks(make_var):
    rates = [block.drop_path.rate for block in make_var(depth=4, drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 1, 3), None)
    assert_close(dropped, dropped[:, :, :1].expand_as(dropped))
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)
    assert_close(dropped.max(), torch.tensor(1 / 0.75))
    assert torch.equal(dropped.unique(), torch.tensor([0, 1 / 0.75]))


@torch.no_grad()
@pytest.mark.parametrize("part", [slice(0, 8), slice(3, 6), slice(7, 8)], ids=str)
def test_training_draws_of_a_part(make_var, make_teacher, part):
    """Labels and residual branches are dropped as in the whole batch of eight."""
    var = make_var(label_drop=0.5, drop_path=0.5).double().train()
    labels, teacher = torch.arange(8) % 5, make_teacher(var, 8)
    torch.manual_seed(2)
    expected, following = var(labels, teacher)[part], torch.rand(1)
    torch.manual_seed(2)
    logits = var(labels[part], teacher[part], Rows(part.start, 8))
    assert_close(logits, expected, rtol=0, atol=1e-12)
    assert torch.equal(torch.rand(1), following)
    if part.start:
        torch.manual_seed(2)
        alone = var(labels[part], teacher[part])
        assert (alone - expected).abs().max() > 1e-3
