"""Learning the dense model's predictions, against closed forms in float64.

Legend: B batch, L tokens, N tokens of all images, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.experiment.graph import run_stage
from dmoe_var.models.blocks import whole
from dmoe_var.training.distillation import prediction_loss
from dmoe_var.training.tuning_objective import TuneConfig

ALL, SHAPE = torch.arange(20), {"label_drop": 0.5, "drop_path": 0.0}


@pytest.fixture
def given():
    """Logits, tokens, and logits of a dense model."""
    generator = torch.Generator().manual_seed(0)
    logits, dense = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    tokens_BL = torch.randint(5, (3, 4), generator=generator)
    return logits.requires_grad_(), tokens_BL, dense


def by_hand(logits_BLV, tokens_BL, dense_BLV, distill):
    """Image by image and token by token; also cross-entropy and divergence alone."""
    cross_entropy = divergence = 0.0
    for b, t in torch.cartesian_prod(*map(torch.arange, tokens_BL.shape)):
        p_V, dense_V = logits_BLV[b, t].softmax(0), dense_BLV[b, t].softmax(0)
        cross_entropy += -p_V[tokens_BL[b, t]].log() / tokens_BL.numel()
        divergence += (dense_V * (dense_V / p_V).log()).sum() / tokens_BL.numel()
    total = (1 - distill) * cross_entropy + distill * divergence
    return [float(each.detach()) for each in (total, cross_entropy, divergence)]


@pytest.mark.parametrize("distill", [0.0, 0.3, 1.0])
def test_loss(given, distill):
    loss, logged = prediction_loss(*given, distill)
    expected, cross_entropy, divergence = by_hand(*given, distill)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert logged == pytest.approx({"ce": cross_entropy, "kl": divergence}, rel=1e-12)


def test_gradient_is_the_difference_of_the_predictions(given):
    logits_BLV, tokens_BL, dense_BLV = given
    prediction_loss(*given, 1.0)[0].backward()
    difference = (logits_BLV.softmax(-1) - dense_BLV.softmax(-1)) / tokens_BL.numel()
    assert_close(logits_BLV.grad, difference.detach())


def test_without_a_dense_model_it_is_the_cross_entropy(given):
    loss, logged = prediction_loss(*given[:2], None, 0.0)
    assert loss.item() == pytest.approx(by_hand(*given, 0.0)[0], rel=1e-12)
    assert logged == {}


def seen_labels(var):
    """Labels that a model is conditioned with, one tensor per call."""
    seen = []
    var.class_emb.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    return seen


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("sparsify", {"alpha": 0.0, "var": SHAPE, "conversion": {"scales": [1, 3]}}),
        ("tune", {"tau": (0.5,), "router_weight": 1e-9}),
    ],
)
def test_objectives_learn_the_dense_model_at_their_scales(build, batch, kind, fields):
    """Tokens 1 to 4 and 14 to 29. Both models see the same classes, of which half are dropped."""
    objective, _ = build(kind, torch.float64, distill=0.7, **fields)
    model = objective.var if kind == "sparsify" else objective.model
    labels = seen_labels(model if kind == "sparsify" else model.dense)
    dense_labels = seen_labels(objective.dense)
    if kind == "sparsify":
        objective.module.train()
    torch.manual_seed(0)
    loss, logged = objective.loss(ALL, 0, 6, whole(20))
    assert torch.equal(dense_labels[-1], labels[0])
    assert 0.3 < float((labels[0] == 10).double().mean()) < 0.7
    learnt = [*range(1, 5), *range(14, 30)]
    with torch.no_grad():
        dense_BLV = objective.dense(labels[0], batch[2])
        if kind == "sparsify":
            logits_BLV = model.predict(labels[0], batch[2])
        else:
            logits_BLV = model(labels[0], batch[2], 0.5, impl="reference")
    expected = by_hand(logits_BLV[:, learnt], batch[0][:, learnt], dense_BLV[:, learnt], 0.7)
    assert [loss.item(), logged["ce"], logged["kl"]] == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.dense.parameters())


@pytest.mark.parametrize("kind", ["sparsify", "tune"])
def test_the_dense_model_stays_and_is_approached(build, run_in, tmp_path, kind):
    objective, config = build(kind, steps=30, lr=3e-3, batch_size=20, distill=1.0)
    dense = {name: p.clone() for name, p in objective.dense.named_parameters()}
    before = objective.loss(ALL, 0, 6, whole(20))[1]["kl"]
    run_in(tmp_path, objective, config)
    assert objective.loss(ALL, 0, 6, whole(20))[1]["kl"] < 0.7 * before
    for name, parameter in objective.dense.named_parameters():
        assert torch.equal(parameter, dense[name])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparsify", "tune"])
def test_validation_measures_the_divergence(build, held_out, kind, monkeypatch):
    """By batches of which the last one is smaller."""
    monkeypatch.setattr("dmoe_var.training.objectives.VALIDATION_BATCH", 4)
    objective, _ = build(kind, torch.float64, distill=1.0)
    tokens_BL, *inputs = held_out
    if kind == "sparsify":
        learnt, logits_BLV = slice(None), objective.var(*inputs)
    else:
        learnt, logits_BLV = [*range(1, 5), *range(14, 30)], objective.model(*inputs, 0.2)
    dense_BLV = objective.dense(*inputs)
    given = (each[:, learnt] for each in (logits_BLV, tokens_BL, dense_BLV))
    assert objective.validate()["val_kl"] == pytest.approx(by_hand(*given, 1.0)[2], rel=1e-6)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_sparsify_loads_the_dense_model(
    make_experiment, use_few_digits, runs, monkeypatch, activation
):
    use_few_digits(monkeypatch)
    how = {"sparsify.distill": 1.0, "sparsify.steps": 2, "sparsify.activation": activation}
    metrics = run_stage(make_experiment(runs, how), "sparsify").metrics
    assert metrics["val_kl"] > 0


def test_without_distillation_no_dense_model_runs(build):
    objective, _ = build("tune", tau=(0.5,))
    assert objective.dense is None
    with pytest.raises(ValueError, match=r"distill=0\.5 needs the dense model"):
        objective.learn_from(None, 0.5)


@pytest.mark.parametrize("cfg", [4.0, (9.0, 1.0, 0.0, 3.0)], ids=["one", "by scale"])
def test_guided_predictions_are_distilled(build, cfg):
    """Both halves of each image, run apart here, joined as sampling joins them: scale si of 4 with
    strength cfg si / 3."""
    objective, _ = build("tune", torch.float64, distill=1.0, guidance=cfg, tau=(0.5,))
    model = objective.model

    def expected(batch):
        _, labels_B, teacher_BLC = batch
        null_B = torch.full_like(labels_B, model.config.num_classes)
        total, count = 0.0, 0
        for si in model.moe_scales:
            tokens = model.config.scale_slices[si]
            t = (cfg if isinstance(cfg, float) else cfg[si]) * si / 3
            guided = []
            for run in (partial(model, tau=0.5), model.dense):
                cond, null = (run(y, teacher_BLC)[:, tokens] for y in (labels_B, null_B))
                guided.append((cond + t * (cond - null)).log_softmax(-1))
            total += (guided[1].exp() * (guided[1] - guided[0])).sum().item()
            count += guided[0][..., 0].numel()
        return total / count

    with torch.no_grad():
        by_hand = expected(objective.batch(objective.training, ALL))
        validated = [expected(batch) for batch in objective.held_out_batches()]
        scores = objective.validate()
    loss, logged = objective.loss(ALL, 0, 6, whole(20))
    assert logged["kl"] == pytest.approx(by_hand, rel=1e-6)
    assert loss.item() == pytest.approx(by_hand + logged["router_mse"], rel=1e-6)
    assert len(validated) == 1
    assert scores["val_kl"] == pytest.approx(validated[0], rel=1e-6)
    loss.backward()
    grads = [p.grad for p in objective.module.parameters()]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_guidance_needs_something_to_distil():
    with pytest.raises(
        ValueError, match=r"^guidance=4 joins predictions .*, but distill=0; allowed"
    ):
        TuneConfig(steps=1, guidance=4.0)
