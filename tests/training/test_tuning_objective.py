"""Tau in the loss: gradients against a float64 model written out by hand, and what training does.

Legend: B batch, L tokens of all scales, l of one, C width, H heads, D head dimension, E experts,
N neurons per expert.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.graph import record_if_done, run_through
from dmoe_var.experiment.record import Record
from dmoe_var.models.blocks import whole
from dmoe_var.stages.parts import loaded
from dmoe_var.training.state import trainable
from dmoe_var.training.tuning_objective import TuneConfig

TAU, WEIGHT = (0.5, 0.7), 0.3
OPTIONS = {"tau": TAU, "router_weight": WEIGHT, "null_share": 0.25}
ALL = torch.arange(20)


def qkv(attn, h_BlC):
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    parts = (h_BlC @ attn.mat_qkv.weight.T + bias).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    scale = attn.scale_mul_1H11.clamp_max(math.log(100)).exp()
    return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v


def masked_ffn(ffn, h_BlC, tau, errors):
    """The sum of the experts that the mask lets run; the routers' errors are noted."""
    a_BlEN = F.relu(torch.einsum("blc,enc->blen", h_BlC, ffn.w1_EDC) + ffn.b1_ED)
    out_BlEC = torch.einsum("blen,enc->blec", a_BlEN, ffn.w2_EDC)
    router = ffn.router
    score_BlE = (F.gelu(h_BlC.detach() @ router.fc1.weight.T) @ router.fc2.weight.T).abs()
    errors.append((score_BlE - out_BlEC.detach().square().sum(-1).sqrt()).square())
    mask_BlE = score_BlE >= tau * score_BlE.amax(-1, keepdim=True)
    return (out_BlEC * mask_BlE[..., None]).sum(2) + ffn.b2_C


def by_hand(model, labels_B, teacher_BLC, tokens_BL):
    """The loss, all scales at once: each scale's backbone on its own tokens, all keys in common."""
    dense, errors = model.dense, []
    spans, tau = model.config.scale_slices, dict(zip(model.moe_scales, TAU, strict=True))
    backbones = [model.moe if si in tau else dense for si in range(len(spans))]
    cond_BC = dense.class_emb(labels_B)
    words = torch.cat([cond_BC[:, None] + dense.pos_start, dense.word_embed(teacher_BLC)], 1)
    x_BLC = words + dense.lvl_embed(dense.lvl_1L) + dense.pos_1LC
    for layer in range(model.config.depth):
        blocks = [backbone.blocks[layer] for backbone in backbones]
        mods = [block.ada_lin(cond_BC).view(-1, 1, 6, 64).unbind(2) for block in blocks]

        def normed(x_BLC, si, place, mods=mods):
            x_BlC = F.layer_norm(x_BLC[:, spans[si]], (64,), eps=1e-6)
            return x_BlC * (1 + mods[si][2 + place]) + mods[si][4 + place]

        parts = [qkv(b.attn, normed(x_BLC, si, 0)) for si, b in enumerate(blocks)]
        q, k, v = (torch.cat(each, 2) for each in zip(*parts, strict=True))
        weights = (q @ k.mT + dense.attn_bias_for_masking).softmax(-1)
        h_BLC = (weights @ v).transpose(1, 2).flatten(2)
        attended = [
            b.attn.proj(h_BLC[:, s]) * m[0] for b, s, m in zip(blocks, spans, mods, strict=True)
        ]
        x_BLC = x_BLC + torch.cat(attended, 1)
        fed = []
        for si, block in enumerate(blocks):
            h_BlC = normed(x_BLC, si, 1)
            run = masked_ffn(block.ffn, h_BlC, tau[si], errors) if si in tau else block.ffn(h_BlC)
            fed.append(run * mods[si][1])
        x_BLC = x_BLC + torch.cat(fed, 1)
    losses = []
    for si in tau:
        scale, shift = model.moe.head_nm.ada_lin(cond_BC).view(-1, 1, 2, 64).unbind(2)
        x_BlC = F.layer_norm(x_BLC[:, spans[si]], (64,), eps=1e-6) * (1 + scale) + shift
        logits = model.moe.head(x_BlC).transpose(1, 2)
        losses.append(F.cross_entropy(logits, tokens_BL[:, spans[si]], reduction="none"))
    router = torch.cat([e.flatten() for e in errors]).mean()
    return torch.cat(losses, 1).mean() + WEIGHT * router


@pytest.mark.parametrize("blocks", [False, True])
def test_gradients_are_those_of_the_masked_model(build, blocks):
    """A dense scale lies between the two with experts: gradients also flow through its keys."""
    objective, _ = build("tune", torch.float64, **OPTIONS, blocks=blocks)
    loss, _ = objective.loss(ALL, 0, 6, whole(20))
    loss.backward()
    tokens_BL, labels_B, teacher_BLC = objective.batch(objective.training, ALL)
    labels_B = torch.cat([torch.full((5,), 10), labels_B[5:]])
    expected = by_hand(objective.model, labels_B, teacher_BLC, tokens_BL)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    parameters = trainable(objective.module)
    assert any("attn" in name for name in parameters) == blocks
    grads = torch.autograd.grad(expected, list(parameters.values()))
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        assert grad.abs().max() > 0, name
        assert_close(parameter.grad, grad, rtol=1e-7, atol=1e-12)
    trained = set(map(id, parameters.values()))
    assert [n for n, p in objective.model.named_parameters() if p.grad is not None] == [
        n for n, p in objective.model.named_parameters() if id(p) in trained
    ]


def test_with_gradients_the_logits_are_the_same(build, batch):
    model = build("tune", **OPTIONS)[0].model
    given = (batch[1], batch[2], TAU)
    assert_close(model.forward_with_gradients(*given, "reference"), model(*given, impl="reference"))


def test_training_lowers_the_masked_loss(build, run_in, tmp_path):
    """With a mask, held-out tokens are predicted worse than with all experts; training helps."""
    objective, config = build("tune", steps=30, lr=3e-3, batch_size=20, tau=(0.6,))
    with torch.no_grad():
        before = objective.validate()
    dense = {name: p.clone() for name, p in objective.model.dense.named_parameters()}
    after = run_in(tmp_path, objective, config)
    assert after["val_ce"] < before["val_ce"] - 0.05
    assert before["val_density"] < 1
    all_on, _ = build("tune", tau=(0.0,))
    with torch.no_grad():
        full = all_on.validate()
    assert full["val_density"] == 1
    assert full["val_ce"] != before["val_ce"]
    by_scale = [(n, after[f"val_density_scale{si}"]) for si, n in ((1, 4), (3, 16))]
    assert after["val_density"] == pytest.approx(sum(n * d for n, d in by_scale) / 20)
    for name, parameter in objective.model.dense.named_parameters():
        assert torch.equal(parameter, dense[name])


@pytest.mark.parametrize("fields", [{}, {"steps": 0}, {"steps": None}])
def test_off(fields):
    assert not TuneConfig(**fields).on
    assert TuneConfig(steps=3).on
    assert TuneConfig(epochs=0.5).on
    with pytest.raises(ValueError, match="exactly one of steps and epochs"):
        TuneConfig(steps=3, epochs=1)


def test_the_stage(make_experiment, use_few_digits, runs, monkeypatch, tmp_path):
    """Between train_router and all that uses experts, but only if it is asked for."""
    use_few_digits(monkeypatch)
    order = []

    def through(experiment, last):
        order.clear()
        return run_through(experiment, last, lambda stage, done: order.append((stage, done)))

    off = make_experiment(runs)
    assert off.needs("evaluate") == off.needs("sweep") == ("train_router",)
    with pytest.raises(ConfigError, match=r"tune_experts.steps=null: .* allowed here: 1 or more"):
        through(off, "tune_experts")
    tuning = {"tune_experts.steps": 2, "tune_experts.tau": [0.6], "tune_experts.lr": 0.05}
    on = make_experiment(runs, tuning)
    record = through(on, "evaluate")
    assert [stage for stage, done in order if not done] == ["tune_experts", "evaluate"]
    tuned = Record.read(on.folder("tune_experts") / "result.json").metrics
    for name in ("val_ce", "val_density", "val_density_scale3", "val_rank_agreement"):
        assert tuned[name] != tuned[f"{name}_before"]
    assert record.is_tuned
    ours, theirs = loaded.split(on).state_dict(), loaded.split(off).state_dict()
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert moved == {name for name in ours if ".ffn." in name}
    whole_blocks = make_experiment(runs, {**tuning, "tune_experts.blocks": True})
    through(whole_blocks, "tune_experts")
    ours = loaded.split(whole_blocks).state_dict()
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    trained = {name for name in ours if name.startswith(("blocks.", "head"))}
    assert {name for name in trained if "zero_k_bias" not in name} == moved
    shared = make_experiment(
        runs, {"tune_experts.blocks": True, "conversion.train": "ffn", **tuning}
    )
    with pytest.raises(ConfigError, match=r"tune_experts\.blocks=true .* allowed with it: false"):
        through(shared, "tune_experts")
    assert record_if_done(off, "train_router") is not None
    assert off.needs("export") == ("train_router",)
    oracle = make_experiment(runs, {"tune_experts.steps": 2, "selection.rule": "oracle"})
    assert oracle.needs("evaluate") == ("tune_experts",)
