"""Gradient accumulation, the optimiser and bfloat16, against whole batches in a plain loop.

Models are float64 where weights are compared: AdamW divides by the gradient's size, so that in
float32 a rounding of a small gradient can move its weight by the learning rate.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.checkpoints.safetensors_io import read_tensors
from dmoe_var.models.blocks import Rows, whole
from dmoe_var.training.rehearsal import rehearse
from dmoe_var.training.state import STATE_FILE
from dmoe_var.training.step import OptimConfig, Run, StepGradients

STEPS = 4
KINDS = {
    "var": ("var", {}),
    "sparsify": ("sparsify", {"alpha": 0.1, "alpha_warmup": 0.5}),
    "sparsify, ffn alone": (
        "sparsify",
        {"alpha": 0.1, "conversion": {"train": "ffn", "scales": "last3"}},
    ),
    "router": ("router", {"null_share": 0.5}),
    "router, an odd batch": ("router", {"null_share": 0.5, "batch_size": 7}),
}
LENGTH = {"dtype": torch.float64, "steps": STEPS, "validate_every": 9, "checkpoint_every": 9}


@pytest.fixture(scope="module")
def references():
    """Weights of the plain loop by name in KINDS, made once."""
    return {}


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 8])
@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_whole_batches(
    name, micro_batch_size, build, run_in, plain_run, references, tmp_path
):
    """Drop path and label dropout are on; the optimiser of the run is fused, the reference's not.

    Weights are compared in float64.
    """
    kind, fields = KINDS[name]
    if name not in references:
        before = {
            n: t.clone() for n, t in build(kind, **LENGTH, **fields)[0].module.named_parameters()
        }
        references[name] = plain_run(*build(kind, **LENGTH, **fields)).state_dict()
        moved = max((references[name][n] - t).abs().max().item() for n, t in before.items())
        assert moved > 1e-3
    objective, config = build(kind, micro_batch_size=micro_batch_size, **LENGTH, **fields)
    run_in(tmp_path, objective, config)
    assert_close(objective.module.state_dict(), references[name], rtol=0, atol=1e-9)


def test_logged_values_are_means_over_the_step(build):
    """Whatever the micro-batches; the last is smaller."""
    logged = {}
    for size in (None, 3):
        objective, config = build("sparsify", alpha=0.1, micro_batch_size=size, **LENGTH)
        objective.module.train()
        run = Run(folder=None, fingerprint="ours", name="test", seed=3)
        logged[size] = StepGradients(objective, config, run, STEPS).compute(torch.arange(8), 1)
    assert set(logged[3]) == {"loss", "ce", "hoyer", "alpha"}
    assert logged[3] == pytest.approx(logged[None], rel=1e-12)
    parts = logged[3]
    assert parts["loss"] == pytest.approx(parts["ce"] + 0.1 * parts["hoyer"], rel=1e-12)


class OneWeight:
    """The gradient of its weight is the mean of the examples' own, which nearly cancel."""

    num_examples, repeatable = 4, True
    gradients = (2.0**30, 1.0, -(2.0**30), 0.0)

    def __init__(self):
        self.module = torch.nn.Linear(1, 1, bias=False)

    def loss(self, indices_B, step, num_steps, rows):
        gradients_B = torch.tensor(self.gradients)[indices_B]
        return (self.module.weight.sum() * gradients_B).mean(), {}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 3, 1)])
def test_gradients_are_summed_in_float64(order):
    """In float32 the sum would depend on its order, and be 0 in the first two."""
    objective = OneWeight()
    config = OptimConfig(steps=1, batch_size=4, micro_batch_size=1)
    run = Run(folder=None, fingerprint="ours", name="test", seed=3)
    StepGradients(objective, config, run, 1).compute(torch.tensor(order), 0)
    assert objective.module.weight.grad.item() == 0.25
    assert objective.module.weight.grad.dtype == torch.float32


def test_a_micro_batch_draws_for_its_own_rows(build):
    """Rows 3, 4 and 5 of 8 lose their labels as in the whole batch, not as rows 0, 1 and 2."""
    objective, _ = build("var", dtype=torch.float64, var={"label_drop": 0.5})
    objective.module.train()
    seen = []
    objective.var.class_emb.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    indices = torch.arange(8)
    for rows in (whole(8), Rows(3, 8)):
        torch.manual_seed(5)
        part = indices[rows.start : rows.start + (8 if rows.start == 0 else 3)]
        objective.loss(part, 0, STEPS, rows)
    assert torch.equal(seen[1], seen[0][3:6])
    null = objective.var.config.num_classes
    assert (seen[0][3:6] == null).tolist() != (seen[0][:3] == null).tolist()


def test_the_optimiser_has_state_for_what_trains_alone(build, run_in, tmp_path):
    """What is stored for a run on is no larger than what it trains."""
    objective, config = build("sparsify", conversion={"train": "ffn"})
    run_in(tmp_path, objective, config)
    tensors, _ = read_tensors(tmp_path / STATE_FILE)
    trained = {n for n, p in objective.module.named_parameters() if ".ffn." in n}
    assert len(trained) == 4 * objective.var.config.depth
    stored = {key.removeprefix("optimizer/").rpartition("/")[0] for key in tensors}
    assert {name for name in stored if name in dict(objective.module.named_parameters())} == trained
    buffers = {f"model/{name}" for name, _ in objective.module.named_buffers()}
    models = {key for key in tensors if key.startswith("model/")}
    assert models == {f"model/{name}" for name in trained} | buffers


@pytest.mark.parametrize("kind", ["var", "sparsify", "router"])
def test_bfloat16_products_train_float32_weights(kind, build, run_in, plain_run, tmp_path):
    """The loss is finite and close to float32's; weights and moments stay float32."""
    objective, config = build(kind)
    dtypes, learner = set(), objective.module if kind == "router" else objective.var.blocks
    for module in learner.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, out: dtypes.add(out.dtype))
    metrics = run_in(tmp_path / "bf16", objective, config, amp_dtype=torch.bfloat16)
    assert torch.bfloat16 in dtypes
    assert all(math.isfinite(value) for value in metrics.values())
    tensors, _ = read_tensors(tmp_path / "bf16" / STATE_FILE)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    exact, config = build(kind)
    expected = run_in(tmp_path / "float32", exact, config)
    main = "val_mse" if kind == "router" else "val_ce"
    assert metrics[main] == pytest.approx(expected[main], rel=0.05)
    assert metrics[main] != expected[main]


@pytest.mark.parametrize("kind", ["var", "sparsify", "router"])
def test_rehearsing_changes_nothing(kind, build, run_in, monkeypatch, tmp_path, capfd):
    """A run that was rehearsed ends with bitwise the weights of one that was not."""
    quiet, config = build(kind, **LENGTH)
    run_in(tmp_path / "quiet", quiet, config)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("dmoe_var.training.loop.LONG_RUN", STEPS)
    shown, config = build(kind, **LENGTH)
    run_in(tmp_path / "shown", shown, config, progress=True)
    text = "".join(capfd.readouterr())
    assert "test: about " in text
    assert f"for {STEPS} steps" in text
    assert_close(shown.module.state_dict(), quiet.module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "expected"), [(None, (1, 8)), (8, (1, 8)), (3, (3, 3)), (1, (8, 1)), (99, (1, 8))]
)
def test_estimate(size, expected, build):
    objective, config = build("router", micro_batch_size=size)
    run = Run(folder=None, fingerprint="ours", name="train_router", seed=3)
    gradients = StepGradients(objective, config, run, STEPS)
    estimate = rehearse(gradients, config.batch_size, 0, run.name)
    assert (estimate.micro_batches, estimate.micro_batch) == expected
    assert estimate.num_trained == sum(p.numel() for p in objective.module.parameters())
    assert estimate.hours == pytest.approx(STEPS * expected[0] * estimate.micro_seconds / 3600)
    assert estimate.memory_bytes > 8 * estimate.num_trained
    assert all(parameter.grad is None for parameter in objective.module.parameters())


def test_a_micro_batch_that_does_not_fit_is_a_wrong_setting(build, monkeypatch):
    from dmoe_var.errors import ConfigError

    objective, config = build("var", micro_batch_size=3)

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(objective, "loss", too_much)
    run = Run(folder=None, fingerprint="ours", name="train_var", seed=3)
    gradients = StepGradients(objective, config, run, STEPS)
    with pytest.raises(ConfigError, match=r"^train_var\.micro_batch_size=3: ") as caught:
        rehearse(gradients, config.batch_size, 0, run.name)
    assert "\n" not in str(caught.value)
