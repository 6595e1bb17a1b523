"""Router regression against naive norms, the constant prediction, and scipy's rank correlation.

Legend: B batch, L tokens of all scales, C width, E experts.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from dmoe_var.conversion.to_moe import informed
from dmoe_var.models.blocks import whole
from dmoe_var.training.router_objective import RouterConfig, RouterObjective, spearman

ALL = torch.arange(20)


def naive_norms(ffn, x_BLC):
    """Expert by expert: the length of its output, the shared bias left out; (B, L, E)."""
    norms = []
    for expert in range(ffn.num_experts):
        h = ffn.act(x_BLC @ ffn.w1_EDC[expert].T + ffn.b1_ED[expert])
        norms.append((h @ ffn.w2_EDC[expert]).square().sum(-1).sqrt())
    return torch.stack(norms, -1)


@torch.no_grad()
def norms_by_layer(var, labels_B, teacher_BLC):
    """Of every layer: true norms and its router's prediction, (B, L, E) each."""
    seen = []
    hooks = [
        block.ffn.register_forward_pre_hook(lambda ffn, args: seen.append((ffn, args[0])))
        for block in var.blocks
    ]
    var(labels_B, teacher_BLC)
    for hook in hooks:
        hook.remove()
    return [(naive_norms(ffn, x_BLC), ffn.router(x_BLC)) for ffn, x_BLC in seen]


def labels_seen(objective, indices_B):
    """The loss of a batch and the labels that the model ran with."""
    seen = []
    hook = objective.var.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss, _ = objective.loss(indices_B, 0, 6, whole(len(indices_B)))
    hook.remove()
    return loss, seen[0]


def mean_over_layers(pairs, error):
    return float(torch.stack([error(true, predicted) for true, predicted in pairs]).mean())


@pytest.mark.parametrize("scales", [None, (1, 3)])
def test_loss_is_the_mean_over_layers_of_the_squared_error(build, batch, scales):
    objective, _ = build("router", scales=scales)
    loss, labels_B = labels_seen(objective, ALL)
    slices = objective.var.config.scale_slices
    learnt = [i for si in scales or range(4) for i in range(slices[si].start, slices[si].stop)]
    naive = mean_over_layers(
        norms_by_layer(objective.var, labels_B, batch[2]),
        lambda true, predicted: (true - predicted)[:, learnt].square().mean(),
    )
    assert loss.item() == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize(("share", "num_null"), [(0.0, 0), (0.25, 5), (1.0, 20)])
def test_a_share_of_the_batch_runs_with_the_null_class(build, batch, share, num_null):
    objective, _ = build("router", null_share=share)
    _, seen_B = labels_seen(objective, ALL)
    null_B = seen_B == objective.var.config.num_classes
    assert int(null_B.sum()) == num_null
    assert torch.equal(seen_B[~null_B], batch[1][~null_B])


def test_no_label_is_dropped_beside_the_share(build, run_in, tmp_path):
    """The experts' model stays in eval mode while the routers train."""
    objective, config = build("router", steps=1)
    run_in(tmp_path, objective, config)
    assert not objective.var.training
    objective.module.train()
    _, labels_B = labels_seen(objective, ALL)
    assert int((labels_B == objective.var.config.num_classes).sum()) == 10


def test_under_a_condition_scale_and_class_of_each_token_train(build, vqvae, tokens):
    """Half of a batch has the null class, 10."""
    plain, config = build("router", torch.float64)
    told = informed(plain.var, "both")
    objective = RouterObjective(told, copy.deepcopy(vqvae).double(), *tokens, config)
    seen = []
    for ffn in objective.ffns:
        router = ffn.router
        torch.nn.init.normal_(router.scale_embed_SR)
        torch.nn.init.normal_(router.class_embed_KR)
        ffn.register_forward_pre_hook(lambda ffn, args: seen.append((ffn, args[0], args[2])))
    loss, _ = objective.loss(torch.arange(4), 0, 1, whole(4))
    labels_B = torch.cat([torch.tensor([10, 10]), objective.batch(tokens[0], ALL[2:4])[1]])
    errors, level_L = [], [0] + 4 * [1] + 9 * [2] + 16 * [3]
    for ffn, x_BLC, normed_BLC in seen:
        router = ffn.router
        told_BLR = router.scale_embed_SR[level_L] + router.class_embed_KR[labels_B][:, None]
        h_BLR = F.gelu(normed_BLC @ router.fc1.weight.T + told_BLR)
        predicted_BLE = (h_BLR @ router.fc2.weight.T).abs()
        errors.append((predicted_BLE - naive_norms(ffn, x_BLC)).square().mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-10)
    loss.backward()
    for ffn in objective.ffns:
        moved_K = ffn.router.class_embed_KR.grad.abs().sum(1) > 0
        assert set(moved_K.nonzero().flatten().tolist()) == set(labels_B.tolist())
        assert (ffn.router.scale_embed_SR.grad.abs().sum(1) > 0).all()


def test_constant_prediction_is_off_by_the_variance(build, vqvae, tokens, batch):
    """Where training and held-out images are the same: the best constant there is."""
    moe = build("router")[0].var
    objective = RouterObjective(moe, vqvae, tokens[0], tokens[0], RouterConfig(steps=1))
    with torch.no_grad():
        metrics = objective.validate()
    _, labels_B, teacher_BLC = batch
    null_B = torch.full_like(labels_B, moe.config.num_classes)
    branches = [norms_by_layer(moe, labels, teacher_BLC) for labels in (labels_B, null_B)]
    variances = [
        torch.cat([cond[0], null[0]]).flatten(0, 1).var(0, correction=0).mean()
        for cond, null in zip(*branches, strict=True)
    ]
    assert metrics["val_mse_constant"] == pytest.approx(float(sum(variances) / 2), rel=1e-4)


def noted(objective, monkeypatch):
    """List the images that an objective asks for from now on, by their indices."""
    seen, batch = [], objective.batch

    def asked(tokens, indices_B):
        seen.extend(indices_B.tolist())
        return batch(tokens, indices_B)

    monkeypatch.setattr(objective, "batch", asked)
    return seen


def test_the_constant_is_that_of_images_all_over_the_set(build, monkeypatch):
    """The first images of a folder are of one class."""
    objective, _ = build("router")
    seen = noted(objective, monkeypatch)
    monkeypatch.setattr("dmoe_var.training.router_objective.CONSTANT_IMAGES", 4)
    assert len(objective.constants_LE) == 2
    quarter = objective.num_examples // 4
    assert [index // quarter for index in seen] == [0, 1, 2, 3]


def test_validation_by_branch_layer_and_scale(build, held_out, monkeypatch):
    monkeypatch.setattr("dmoe_var.training.objectives.VALIDATION_BATCH", 4)
    objective, _ = build("router")
    with torch.no_grad():
        metrics = objective.validate()
    _, labels_B, teacher_BLC = held_out
    null_B = torch.full_like(labels_B, objective.var.config.num_classes)
    both = []
    for branch, labels in (("cond", labels_B), ("null", null_B)):
        pairs = norms_by_layer(objective.var, labels, teacher_BLC)
        both.append(pairs)
        error = mean_over_layers(pairs, lambda a, b: (a - b).square().mean())
        assert metrics[f"val_mse_{branch}"] == pytest.approx(error, rel=1e-4)
        order = mean_over_layers(pairs, lambda a, b: spearman(b, a).mean())
        assert metrics[f"val_rank_agreement_{branch}"] == pytest.approx(order, rel=1e-4)
    for name in ("val_mse", "val_mse_constant", "val_rank_agreement"):
        by_branch = [metrics[f"{name}_{branch}"] for branch in ("cond", "null")]
        assert metrics[name] == pytest.approx(sum(by_branch) / 2)
    for si, scale in enumerate(objective.var.config.scale_slices):
        errors = [(a - b)[:, scale].square().mean() for a, b in (both[0][1], both[1][1])]
        assert metrics[f"val_mse_layer1_scale{si}"] == pytest.approx(
            float(sum(errors) / 2), rel=1e-4
        )


def test_validation_takes_images_all_over_the_set(build, monkeypatch):
    objective, _ = build("router")
    seen = noted(objective, monkeypatch)
    total = len(objective.held_out)
    for most, expected in ((2, [0, total // 2]), (total + 1, [*range(total)])):
        monkeypatch.setattr(objective, "most_validated", most)
        seen.clear()
        assert len([*objective.held_out_batches()]) == 1
        assert seen == expected


def test_rank_agreement_is_spearmans():
    """Ties count as ties: sparse experts have a norm of exactly 0. Where there is no order to
    predict it is 0."""
    generator = torch.Generator().manual_seed(1)
    predicted_BLE = torch.rand(3, 4, 7, generator=generator)
    for num_values in (3, 10**6):
        true_BLE = torch.randint(num_values, (3, 4, 7), generator=generator).float()
        tokens = zip(predicted_BLE.flatten(0, 1), true_BLE.flatten(0, 1), strict=True)
        theirs = [spearmanr(predicted_E, true_E).statistic for predicted_E, true_E in tokens]
        assert spearman(predicted_BLE, true_BLE).flatten().tolist() == pytest.approx(theirs)
        assert spearman(true_BLE, true_BLE).flatten().tolist() == pytest.approx([1] * 12)
    assert spearman(predicted_BLE, torch.zeros(3, 4, 7)).eq(0).all()


def test_routers_of_a_dense_model(make_var, vqvae, tokens):
    with pytest.raises(ValueError, match="split it first"):
        RouterObjective(make_var(), vqvae, *tokens, RouterConfig(steps=1))
