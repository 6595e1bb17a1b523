"""Base and sparse objectives against naive references, on tiny models.

Legend: B batch, L tokens of all scales, V vocabulary, H neurons of an FFN.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from dmoe_var.models.blocks import whole
from dmoe_var.training.objectives import ConversionConfig, SparsifyConfig

ALL = torch.arange(20)


def naive_cross_entropy(logits_BLV, tokens_BL):
    """(B, L), token by token."""
    logits_BLV = logits_BLV.detach()
    return torch.tensor(
        [
            [-logits_V.log_softmax(0)[token] for logits_V, token in zip(*image, strict=True)]
            for image in zip(logits_BLV, tokens_BL, strict=True)
        ]
    )


def naive_hoyer(a_BLH):
    tokens = a_BLH.double().flatten(0, 1)
    return sum(float(a_H.abs().sum() ** 2 / (a_H @ a_H + 1e-15)) for a_H in tokens) / len(tokens)


@contextmanager
def pre_activations(var):
    """What leaves every FFN's first layer."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: seen.append(output))
        for name, module in var.named_modules()
        if name.endswith("fc1") and isinstance(module, nn.Linear)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_cross_entropy_weighs_all_tokens_alike(build, batch):
    objective, _ = build("var")
    loss, _ = objective.loss(ALL, 0, 6, whole(20))
    tokens_BL, *inputs = batch
    naive = naive_cross_entropy(objective.var(*inputs), tokens_BL).sum() / tokens_BL.numel()
    torch.testing.assert_close(loss.detach(), naive)


def test_scales_are_weighted_by_their_tokens_weights(build, batch):
    """Of 1, 4, 9 and 16 tokens; only ratios of weights count, and validation weighs none."""
    objective, _ = build("var")
    validate = torch.no_grad()(objective.validate)
    unweighted = validate()
    tokens_BL, *inputs = batch
    naive_BL = naive_cross_entropy(objective.var(*inputs), tokens_BL).detach()
    weights_L = torch.tensor([3.0] + 4 * [0.0] + 9 * [1.0] + 16 * [0.5])
    expected = (weights_L * naive_BL).sum() / (weights_L.sum() * len(tokens_BL))
    for factor in (1, 7):
        objective.weight_scales((3 * factor, 0, factor, 0.5 * factor))
        loss, logged = objective.loss(ALL, 0, 6, whole(20))
        torch.testing.assert_close(loss.detach(), expected)
        assert logged == {}
    assert validate() == unweighted


@pytest.mark.parametrize("weights", [[1e-50] * 4, [1e300] * 4, [1e39, 1, 1, 1]])
def test_weights_of_scales_may_be_extreme(build, weights):
    objective, _ = build("var")
    objective.weight_scales(weights)
    assert objective.weights_L.dtype == torch.float32
    assert objective.weights_L.mean().item() == pytest.approx(1)
    expected = 30 if weights[1] == 1 else 1
    assert objective.weights_L[0].item() == pytest.approx(expected)


def test_validation_by_scale(build, held_out, monkeypatch):
    """By batches of which the last one is smaller."""
    monkeypatch.setattr("dmoe_var.training.objectives.VALIDATION_BATCH", 4)
    objective, _ = build("var")
    tokens_BL, *inputs = held_out
    with torch.no_grad():
        metrics = objective.validate()
        logits_BLV = objective.var(*inputs)
    loss_BL = naive_cross_entropy(logits_BLV, tokens_BL)
    hit_BL = (logits_BLV.argmax(-1) == tokens_BL).float()
    naive = {"val_ce": loss_BL.mean(), "val_accuracy": hit_BL.mean()}
    start = 0
    for si, p in enumerate(objective.var.config.patch_nums):
        scale = slice(start, start + p * p)
        naive[f"val_ce_scale{si}"] = loss_BL[:, scale].mean()
        naive[f"val_accuracy_scale{si}"] = hit_BL[:, scale].mean()
        start += p * p
    assert metrics == pytest.approx({name: float(value) for name, value in naive.items()})


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0.0, [4, 4, 4, 4]), (0.5, [2, 4, 4, 4]), (1.0, [1, 2, 3, 4])],
)
def test_alpha_warms_up(warmup, expected):
    config = SparsifyConfig(steps=4, alpha=4.0, alpha_warmup=warmup)
    assert [config.alpha_at(step, 4) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("activation", "scales"), [("relu", "all"), ("relu", "last3"), ("gelu", (0, 2))]
)
def test_sparsify_loss_is_cross_entropy_plus_alpha_hoyer(build, batch, activation, scales):
    """Of the tokens of some scales (1, 4, 9 and 16 tokens there are). Hoyer on ReLU's output;
    without ReLU on the clamped and shifted pre-activations."""
    learnt = {"all": range(30), "last3": range(1, 30), (0, 2): [0, *range(5, 14)]}[scales]
    fields = {"alpha": 0.3, "alpha_warmup": 0.5, "activation": activation}
    objective, _ = build("sparsify", conversion={"scales": scales}, **fields)
    with torch.no_grad(), pre_activations(objective.var) as layers:
        loss, logged = objective.loss(ALL, 0, 6, whole(20))
        logits_BLV = objective.var(*batch[1:])
    z = [z_BLH[:, list(learnt)] for z_BLH in layers[: objective.var.config.depth]]
    made_sparse = [a.clamp(min=0) if activation == "relu" else a.clamp(min=-10) + 10 for a in z]
    hoyer = sum(map(naive_hoyer, made_sparse)) / len(made_sparse)
    cross_entropy_BL = naive_cross_entropy(logits_BLV, batch[0])
    cross_entropy = float(cross_entropy_BL[:, list(learnt)].mean())
    assert logged == pytest.approx({"ce": cross_entropy, "hoyer": hoyer, "alpha": 0.1}, rel=1e-4)
    assert loss.item() == pytest.approx(cross_entropy + 0.1 * hoyer, rel=1e-4)


@pytest.mark.parametrize(
    ("scales", "num_scales", "expected"),
    [("all", 4, (0, 1, 2, 3)), ("last3", 4, (1, 2, 3)), ("last3", 2, (0, 1)), ([1], 4, (1,))],
)
def test_names_of_scales(scales, num_scales, expected):
    assert ConversionConfig(scales=scales).scale_numbers(num_scales) == expected


def test_fine_tuning_drops_labels_and_validation_does_not(build, run_in, tmp_path):
    objective, config = build("sparsify", steps=2, var={"label_drop": 0.5})
    var, seen = objective.var, {True: [], False: []}
    var.class_emb.register_forward_pre_hook(lambda _, args: seen[var.training].append(args[0]))
    run_in(tmp_path, objective, config)
    share = {mode: float((torch.cat(s) == 10).float().mean()) for mode, s in seen.items()}
    assert share[True] == pytest.approx(0.5, abs=0.3)
    assert share[False] == 0


@pytest.mark.parametrize(
    ("kind", "fields", "amp_dtype"),
    [
        ("var", {}, torch.bfloat16),
        ("sparsify", {"alpha": 0.5, "conversion": {"scales": "last3"}}, torch.bfloat16),
        ("sparsify", {"alpha": 0.5, "conversion": {"train": "ffn"}}, torch.float32),
    ],
)
def test_activation_checkpointing_gives_the_same_gradients(kind, fields, amp_dtype, build):
    """Bitwise; half of the residual branches and of the labels are dropped."""
    found = []
    for checkpointed in (False, True):
        shape = {"drop_path": 0.5, "label_drop": 0.5}
        objective, _ = build(kind, activation_checkpointing=checkpointed, var=shape, **fields)
        objective.module.train()
        torch.manual_seed(7)
        with torch.autocast("cpu", amp_dtype, enabled=amp_dtype != torch.float32):
            loss, _ = objective.loss(ALL[:8], 0, 6, whole(8))
        loss.backward()
        named = objective.module.named_parameters()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    assert len(found[0]) > 1
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def bytes_kept(objective):
    """What a loss keeps for its backward pass, net of all that was freed on the way."""
    objective.module.train()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss, _ = objective.loss(ALL, 0, 6, whole(20))
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


def test_activation_checkpointing_keeps_less(build):
    """Beside the inputs of eight blocks: what one of them keeps is many times its input."""
    kept = [
        bytes_kept(build("sparsify", var={"depth": 8}, activation_checkpointing=on)[0])
        for on in (False, True)
    ]
    inputs = 8 * 20 * 30 * 64 * 4
    assert kept[0] > 15 * inputs
    assert inputs < kept[1] < 4 * inputs, kept


def test_hoyer_moves_the_ffn(build):
    """The gradient of alpha's term reaches the weights that it is to make sparse."""
    gradients = []
    for alpha in (0.0, 1.0):
        objective, _ = build("sparsify", alpha=alpha)
        objective.loss(ALL, 0, 6, whole(20))[0].backward()
        gradients.append(objective.var.blocks[0].ffn.fc1.weight.grad)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-4


def test_inactive_share_by_layer_and_scale(build, held_out):
    objective, _ = build("sparsify")
    with torch.no_grad():
        metrics = objective.validate()
        with pre_activations(objective.var) as layers:
            objective.var(*held_out[1:])
    shares = {
        f"val_inactive_layer{layer}_scale{si}": float((z_BLH[:, scale] <= 0).float().mean())
        for layer, z_BLH in enumerate(layers)
        for si, scale in enumerate(objective.var.config.scale_slices)
    }
    shares["val_inactive"] = float((torch.stack(layers) <= 0).float().mean())
    assert {name: metrics[name] for name in metrics if "inactive" in name} == pytest.approx(shares)
    hoyer = sum(naive_hoyer(z_BLH.clamp(min=0)) for z_BLH in layers) / len(layers)
    assert metrics["val_hoyer"] == pytest.approx(hoyer, rel=1e-4)


@pytest.mark.parametrize("kind", ["vqvae", "sparsify", "router"])
def test_validation_has_no_chance_and_no_effect(build, kind):
    objective, _ = build(kind)
    before = {name: t.clone() for name, t in objective.module.state_dict().items()}
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        objective.module.eval()
        with torch.no_grad():
            results.append(objective.validate())
    assert results[0] == results[1]
    torch.testing.assert_close(objective.module.state_dict(), before, rtol=0, atol=0)
