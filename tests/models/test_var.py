"""The dense VAR: the published code's logits and sizes, loops in float64, train-only randomness."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import VAR, VARConfig, VQVAEConfig, build_models
from dmoe_var.models.blocks import Block, DropPath, Rows, SelfAttention, whole
from dmoe_var.models.var import check_pair
from dmoe_var.moe.layer import ExpertConfig
from dmoe_var.ops import activation


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


def test_scale_slices():
    config = VARConfig(patch_nums=(2, 3, 5))
    assert config.scale_slices == (slice(0, 4), slice(4, 13), slice(13, 38))


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


def test_build_models_gives_a_pair():
    base = VQVAEConfig(ch=32, ch_mult=(1, 1), patch_nums=(1, 2), vocab_size=16, z_channels=4)
    vqvae, var = build_models(2, base, width=32, num_heads=2, patch_nums=[1, 2, 3], z_channels=8)
    assert vqvae.config == replace(base, patch_nums=(1, 2, 3), z_channels=8)
    assert (var.config.patch_nums, var.config.vocab_size) == ((1, 2, 3), 16)
    check_pair(vqvae, var.config)


@pytest.mark.parametrize(
    "other", [{"patch_nums": (1, 2, 3)}, {"vocab_size": 64}, {"z_channels": 4}]
)
def test_strangers_are_no_pair(make_vqvae, make_var, other):
    (name,) = other
    with pytest.raises(ValueError, match=name):
        check_pair(make_vqvae(), replace(make_var().config, **other))


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


# Attention and block, by loops


@pytest.mark.parametrize("l2_norm", [True, False])
def test_attention_by_loops(l2_norm):
    torch.manual_seed(0)
    width, heads, length = 24, 3, 5
    dim = width // heads
    attn = SelfAttention(width, heads, l2_norm).double()
    for bias in (attn.q_bias, attn.v_bias):
        torch.nn.init.normal_(bias)
    if l2_norm:  # the last head's temperature is capped at 100
        attn.scale_mul_1H11.data = torch.tensor([0.3, 1.2, 7.0]).double().view(1, 3, 1, 1)
    x = torch.randn(2, length, width, dtype=torch.float64)
    level = torch.tensor([0, 1, 1, 2, 2])
    mask = torch.zeros(length, length).masked_fill(level[:, None] < level[None], -torch.inf)

    q, k, v = (x @ w.T for w in attn.mat_qkv.weight.chunk(3))
    q, v = q + attn.q_bias, v + attn.v_bias
    h = torch.zeros_like(x)
    for b in range(2):
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            for i in range(length):
                seen = [j for j in range(length) if level[j] <= level[i]]
                scores = []
                for j in seen:
                    qi, kj = q[b, i, part], k[b, j, part]
                    if l2_norm:
                        temperature = min(attn.scale_mul_1H11[0, head, 0, 0].exp().item(), 100)
                        scores.append(temperature * qi @ kj / (qi.norm() * kj.norm()))
                    else:
                        scores.append(0.25 / math.sqrt(dim) * qi @ kj)
                weights = torch.stack(scores).softmax(0)
                h[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, seen, strict=True))
    expected = attn.proj(h)
    assert_close(attn(x, 0, mask[None, None], None), expected, rtol=0, atol=1e-12)


def test_order_of_the_adaln_chunks():
    torch.manual_seed(0)
    width = 8
    x, attended, fed = torch.randn(3, 2, 5, width, dtype=torch.float64)

    class Branch(torch.nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, x_BLC, *_):
            self.seen = x_BLC
            return self.output

    block = Block(width, Branch(fed), 2, 0.0, True, False, 1e-6).double()
    block.attn = Branch(attended)
    chunks = torch.randn(6, width, dtype=torch.float64)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = chunks
    out = block(x, chunks.expand(2, 1, 6, width), layer=0)

    def norm(y):
        variance = y.var(-1, correction=0, keepdim=True)
        return (y - y.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()

    after_attention = x + gamma1 * attended
    assert_close(block.attn.seen, norm(x) * (1 + scale1) + shift1)
    assert_close(block.ffn.seen, norm(after_attention) * (1 + scale2) + shift2)
    assert_close(out, after_attention + gamma2 * fed)


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    tanh = (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()
    assert_close(activation("gelu")(x), 0.5 * x * (1 + tanh))
    assert_close(activation("relu")(x), x.clamp_min(0))
    with pytest.raises(ValueError, match="'silu'"):
        activation("silu")


# What a token may see


@torch.no_grad()
@pytest.mark.parametrize("si", [1, 2, 3])
def test_tokens_of_a_scale_do_not_reach_lower_scales(make_var, make_teacher, si):
    var = make_var().double()
    teacher, labels = make_teacher(var), torch.tensor([1, 4])
    tokens = var.config.scale_slices[si]
    changed = teacher.clone()
    changed[:, tokens.start - 1 : tokens.stop - 1] += 1
    before, after = var(labels, teacher), var(labels, changed)
    assert_close(after[:, : tokens.start], before[:, : tokens.start], rtol=0, atol=0)
    per_token = (after - before)[:, tokens.start :].abs().amax((0, 2))
    assert (per_token > 1e-3).all()


@torch.no_grad()
def test_every_token_of_a_scale_sees_the_whole_scale(make_var, make_teacher):
    var = make_var()
    teacher, labels = make_teacher(var), torch.tensor([1, 4])
    changed = teacher.clone()
    changed[:, 3] += 1  # the last of scale 1's four tokens, which are 1..4 of all
    moved = (var(labels, changed) - var(labels, teacher)).abs().amax((0, 2))
    assert moved[0] == 0
    assert (moved[1:] > 1e-4).all()


# Random in train mode, and only there


@torch.no_grad()
def test_labels_are_dropped_in_train_mode_only(make_var, make_teacher):
    var = make_var(label_drop=0.5, drop_path=0.0)
    labels = torch.arange(5).repeat(8)
    teacher = make_teacher(var, 1).expand(len(labels), -1, -1)
    kept, dropped = var(labels, teacher), var(torch.full_like(labels, 5), teacher)
    assert_close(var(labels, teacher), kept, rtol=0, atol=0)
    torch.manual_seed(0)
    mixed = var.train()(labels, teacher)
    is_kept = (mixed - kept).abs().amax((1, 2)) < 1e-4
    is_dropped = (mixed - dropped).abs().amax((1, 2)) < 1e-4
    assert (is_kept ^ is_dropped).all()
    assert 8 < is_dropped.sum() < 32


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


@pytest.mark.parametrize("part", [Rows(0, 40), Rows(39, 40), Rows(13, 40)])
def test_a_part_draws_what_its_rows_of_the_batch_do(part):
    size = min(17, part.total - part.start)
    gamma_B1C = torch.randn(40, 1, 3)
    mine = slice(part.start, part.start + size)
    drop_path = DropPath(0.5).train()
    torch.manual_seed(1)
    whole_B1C, following = drop_path(gamma_B1C, whole(40)), torch.rand(1)
    torch.manual_seed(1)
    part_B1C = drop_path(gamma_B1C[mine], part)
    assert torch.equal(part_B1C, whole_B1C[mine])
    assert torch.equal(torch.rand(1), following)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 3, 7])
def test_training_draws_of_a_part(make_var, make_teacher, start):
    """Labels and residual branches of rows 3.. of eight are dropped as in the whole batch."""
    var = make_var(label_drop=0.5, drop_path=0.5).double().train()
    labels, teacher = torch.arange(8) % 5, make_teacher(var, 8)
    torch.manual_seed(2)
    expected = var(labels, teacher)
    torch.manual_seed(2)
    logits = var(labels[start:], teacher[start:], Rows(start, 8))
    assert_close(logits, expected[start:], rtol=0, atol=1e-12)
    if start:
        torch.manual_seed(2)
        alone = var(labels[start:], teacher[start:])
        assert (alone - expected[start:]).abs().max() > 1e-3


@torch.no_grad()
def test_without_training_rows_mean_nothing(make_var, make_teacher):
    var = make_var(label_drop=0.5, drop_path=0.5)
    inputs = torch.tensor([1, 4]), make_teacher(var)
    assert torch.equal(var(*inputs, Rows(3, 9)), var(*inputs))
