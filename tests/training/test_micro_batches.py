"""Gradient accumulation, the optimiser and bfloat16, against whole batches in a plain loop.

Models are float64 where weights are compared: AdamW divides by the gradient's size, so that in
float32 a rounding of a small gradient can move its weight by the learning rate.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.checkpoints.tensor_files import read_tensors
from dmoe_var.errors import ConfigError
from dmoe_var.models.blocks import whole
from dmoe_var.training.loop import BatchOrder, parameter_groups
from dmoe_var.training.rehearsal import rehearse
from dmoe_var.training.state import STATE_FILE
from dmoe_var.training.step import OptimConfig, Run, StepGradients, step_seed

STEPS = 3
LENGTH = {
    "dtype": torch.float64, "steps": STEPS, "validate_every": 9, "checkpoint_every": 9, "clip": 0.01
}  # fmt: skip
RUN = Run(folder=None, fingerprint="ours", name="train_var", seed=3)
FFN_ALONE = {
    "alpha": 0.1, "alpha_warmup": 0.5, "conversion": {"train": "ffn", "scales": "last3"}
}  # fmt: skip


def plain_run(objective, config):
    """The same training in a few lines, on whole batches, with the optimiser that torch implements
    tensor by tensor; the run's is fused."""
    module = objective.module
    groups = parameter_groups(module, config.weight_decay)
    options = {"betas": config.betas, "fused": False, "foreach": False}
    optimizer = torch.optim.AdamW(groups, **options)
    order = BatchOrder(objective.num_examples, config.batch_size, RUN.seed)
    for step in range(config.steps):
        module.train()
        torch.manual_seed(step_seed(RUN.seed, step))
        indices_B = order.batch(step)
        optimizer.zero_grad()
        loss, _ = objective.loss(indices_B, step, config.steps, whole(len(indices_B)))
        loss.backward()
        trained = [p for group in groups for p in group["params"] if p.grad is not None]
        norm = sum(float(p.grad.square().sum()) for p in trained) ** 0.5
        assert norm > config.clip
        for parameter in trained:
            parameter.grad *= min(1.0, config.clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step, config.steps)
        optimizer.step()
    return module.state_dict()


@pytest.mark.parametrize(
    ("kind", "micro_batch_size", "fields"),
    [
        ("var", None, {}),
        ("var", 3, {}),
        ("sparsify", 3, FFN_ALONE),
        ("router", 3, {"batch_size": 7}),
        ("tune", 3, {"batch_size": 7, "lr": 1e-3}),
    ],
)
def test_weights_are_those_of_whole_batches(
    kind, micro_batch_size, fields, build, run_in, tmp_path
):
    """Drop path and label dropout are on: a micro-batch draws for its own rows of the batch."""
    objective, config = build(kind, **LENGTH, **fields)
    before = {name: t.clone() for name, t in objective.module.named_parameters()}
    expected = plain_run(objective, config)
    assert max((expected[n] - t).abs().max().item() for n, t in before.items()) > 1e-3
    objective, config = build(kind, micro_batch_size=micro_batch_size, **LENGTH, **fields)
    run_in(tmp_path, objective, config)
    assert_close(objective.module.state_dict(), expected, rtol=0, atol=1e-9)


def test_logged_values_are_means_over_the_step(build):
    """Whatever the micro-batches; the last is smaller."""
    logged = {}
    for size in (None, 3):
        objective, config = build("sparsify", alpha=0.1, micro_batch_size=size, **LENGTH)
        objective.module.train()
        logged[size] = StepGradients(objective, config, RUN, STEPS).compute(torch.arange(8), 1)
    parts = logged[3]
    assert set(parts) == {"loss", "ce", "hoyer", "alpha"}
    assert parts == pytest.approx(logged[None], rel=1e-12)
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


def gradients_of(objective, micro_batch_size):
    config = OptimConfig(steps=1, batch_size=4, micro_batch_size=micro_batch_size)
    return StepGradients(objective, config, RUN, 1)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 3, 1)])
def test_gradients_are_summed_in_float64(order):
    """In float32 the sum would depend on its order, and be 0 in the first two."""
    objective = OneWeight()
    gradients_of(objective, 1).compute(torch.tensor(order), 0)
    assert objective.module.weight.grad.item() == 0.25
    assert objective.module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("size", "expected"), [(None, 4), (3, 3), (99, 4)])
def test_size_of_a_micro_batch(size, expected):
    assert gradients_of(OneWeight(), size).size(4) == expected


def test_the_optimiser_has_state_for_what_trains_alone(build, run_in, tmp_path):
    """What is stored for a run on is no larger than what it trains."""
    objective, config = build("sparsify", steps=1, conversion={"train": "ffn"})
    run_in(tmp_path, objective, config)
    tensors, _ = read_tensors(tmp_path / STATE_FILE)
    trained = {n for n, _ in objective.module.named_parameters() if ".ffn." in n}
    buffers = {n for n, _ in objective.module.named_buffers()}
    moments = {f"{name}/{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {key.partition("/")[2] for key in tensors} == trained | buffers | moments


@pytest.mark.parametrize("kind", ["var", "router"])
def test_bfloat16_products_train_float32_weights(kind, build, run_in, tmp_path):
    """The loss is finite and close to float32's; weights and moments stay float32."""
    objective, config = build(kind, steps=1)
    dtypes = set()
    for module in objective.module.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, out: dtypes.add(out.dtype))
    metrics = run_in(tmp_path / "bf16", objective, config, amp_dtype=torch.bfloat16)
    assert torch.bfloat16 in dtypes
    assert all(math.isfinite(value) for value in metrics.values())
    tensors, _ = read_tensors(tmp_path / "bf16" / STATE_FILE)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    expected = run_in(tmp_path / "float32", *build(kind, steps=1))
    main = "val_mse" if kind == "router" else "val_ce"
    assert metrics[main] == pytest.approx(expected[main], rel=0.05)
    assert metrics[main] != expected[main]


def test_a_rehearsal_changes_nothing(build, run_in, monkeypatch, tmp_path, capfd):
    """It says what the run takes, which ends with bitwise the weights of one not rehearsed."""
    fields = {**LENGTH, "micro_batch_size": 3}
    quiet, config = build("sparsify", **fields)
    run_in(tmp_path / "quiet", quiet, config)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("dmoe_var.training.loop.LONG_RUN", STEPS)
    shown, config = build("sparsify", **fields)
    run_in(tmp_path / "shown", shown, config, progress=True)
    millions = sum(p.numel() for p in shown.module.parameters() if p.requires_grad) / 1e6
    said = (
        rf"test: about \d+\.\d GB on cpu and \d+\.\d min for {STEPS} steps, validation left out "
        r"\(3 micro-batches of 3 a step in each of 1 processes, \d+\.\d\d s each; "
        rf"{millions:.1f} M parameters train\)"
    )
    assert re.search(said, capfd.readouterr().err)
    assert_close(shown.module.state_dict(), quiet.module.state_dict(), rtol=0, atol=0)


def test_a_micro_batch_that_does_not_fit_is_a_wrong_setting(monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(OneWeight, "loss", too_much)
    with pytest.raises(ConfigError, match=r"^train_var\.micro_batch_size=3: ") as caught:
        rehearse(gradients_of(OneWeight(), 3), 4, 0, RUN.name)
    assert "\n" not in str(caught.value)
