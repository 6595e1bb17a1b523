"""The training loop: schedule, batches, decay, resuming, and what it does not let pass."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dmoe_var.errors import TrainingDiverged
from dmoe_var.training.loop import BatchOrder, Snapshots, parameter_groups
from dmoe_var.training.state import STATE_FILE, StateFile
from dmoe_var.training.step import OptimConfig


class Interrupted(Exception):
    pass


def stop_before(objective, stop):
    """Makes the objective raise at that step."""
    loss = objective.loss

    def until(indices_B, step, num_steps, rows):
        if step == stop:
            raise Interrupted
        return loss(indices_B, step, num_steps, rows)

    objective.loss = until
    return objective


def lines(folder):
    """metrics.jsonl without the times."""
    text = (folder / "metrics.jsonl").read_text()
    return [{**json.loads(line), "step_s": None} for line in text.splitlines()]


def assert_same_weights(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("schedule", "high"),
    [
        ("constant", [1] * 6),
        ("linear", [1 - k / 6 for k in range(6)]),
        ("cosine", [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]),
    ],
)
def test_learning_rate(schedule, high):
    """Two of eight steps warm up; then `high` is the share of lr, the rest being lr_end's."""
    config = OptimConfig(steps=8, lr=3.0, lr_end=1.0, schedule=schedule, warmup=0.25)
    rates = [config.lr_at(step, 8) for step in range(8)]
    assert rates == pytest.approx([1.0, 2.0, *(3 * h + 1 * (1 - h) for h in high)])


@pytest.mark.parametrize(
    ("length", "batch_size", "expected"),
    [
        ({"steps": 7}, 4, 7),
        ({"epochs": 2}, 4, 5),
        ({"epochs": 1.3}, 4, 4),
        ({"epochs": 0.01}, 4, 1),
        ({"epochs": 2}, 64, 2),
    ],
)
def test_number_of_steps(length, batch_size, expected):
    """Of ten examples; a batch is never larger than the set, and every epoch is finished."""
    assert OptimConfig(**length, batch_size=batch_size).num_steps(10) == expected


def test_training_goes_on_in_train_mode_after_a_validation(toy, run_in, tmp_path):
    """Validation sees the model in eval mode, every step in train mode."""
    objective, modes = toy(), []
    loss, validate = objective.loss, objective.validate
    objective.loss = lambda *args: modes.append(objective.module.training) or loss(*args)
    objective.validate = lambda: modes.append(objective.module.training) or validate()
    run_in(tmp_path, objective, OptimConfig(steps=4, validate_every=2))
    assert modes == [True, True, False, True, True, False]
    assert not objective.module.training


@pytest.mark.parametrize(("num", "size"), [(10, 3), (7, 7), (5, 64)])
def test_batches_are_shuffled_epochs_and_follow_from_the_step(num, size):
    order = BatchOrder(num, size, seed=1)
    batches = [order.batch(step) for step in range(4 * num)]
    assert {len(batch) for batch in batches} == {min(num, size)}
    epochs = torch.cat(batches)[: 4 * num].view(4, num)
    assert torch.equal(epochs.sort().values, torch.arange(num).expand(4, num))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    torch.manual_seed(5)
    for step in (3, 0, 3):
        assert torch.equal(BatchOrder(num, size, seed=1).batch(step), batches[step])
    others = [BatchOrder(num, size, seed=2).batch(step) for step in range(4)]
    assert not torch.equal(torch.cat(others), torch.cat(batches[:4]))


DENSE_FFN = {f"blocks.0.ffn.{name}" for name in ("fc1.weight", "fc2.weight")}
EXPERT_FFN = {
    f"blocks.0.ffn.{name}"
    for name in ("w1_EDC", "w2_EDC", "router.fc1.weight", "router.fc2.weight")
}
ATTENTION = {f"blocks.0.attn.{name}.weight" for name in ("mat_qkv", "proj")}
OTHERS = {f"{name}.weight" for name in ("word_embed", "class_emb", "head_nm.ada_lin.1", "head")}


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_decays(experts, shared, make_var, make_moe):
    """Matrices alone: no biases, positions, levels, AdaLN offsets or attention temperatures."""
    var = make_var(depth=1, shared_adaln=shared)
    module = make_moe(var) if experts else var
    names = {parameter: name for name, parameter in module.named_parameters()}
    decayed, spared = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    adaln = "shared_ada_lin.1.weight" if shared else "blocks.0.ada_lin.1.weight"
    expected = OTHERS | ATTENTION | {adaln} | (EXPERT_FFN if experts else DENSE_FFN)
    assert {names[p] for p in decayed["params"]} == expected
    assert {names[p] for p in spared["params"]} == set(names.values()) - expected


KINDS = ("vqvae", "sparsify", "router", "classifier", "tune")


@pytest.mark.parametrize("kind", KINDS)
def test_two_and_two_steps_are_four(kind, build, run_in, tmp_path):
    """Stopped after step 3, where only step 2 is stored, and started again: bitwise the same.
    Started once more, nothing trains again, as where a kill came after the last step."""
    whole, config = build(kind, steps=4, checkpoint_every=2, ema=0.9 if kind == "router" else None)
    metrics = run_in(tmp_path / "whole", whole, config)
    written = lines(tmp_path / "whole")
    assert [line["step"] for line in written] == [1, 2, 2, 3, 4, 4]
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        run_in(parts, stop_before(build(kind)[0], 3), config)
    assert lines(parts) == written[:4]
    for stop in (None, 0):
        rest = stop_before(build(kind)[0], stop)
        assert run_in(parts, rest, config) == metrics
        assert_same_weights(rest.module, whole.module)
        assert lines(parts) == written


def test_averaged_weights(toy, run_in, tmp_path):
    """Each step's weights w enter as avg = d avg + (1 - d) w, d = min(ema, (1 + t) / (10 + t)),
    from the initial weights on. The average is what is validated, kept and left in the module;
    training goes on from the last step's weights."""
    seen, plain, averaged = [], toy(), toy()
    plain.after_step = lambda *_: seen.append(plain.module.weight.detach().double())
    expected = [plain.module.weight.detach().double()]
    run_in(tmp_path / "plain", plain, OptimConfig(steps=4, lr=0.1))
    for t, weight in enumerate(seen):
        decay = min(0.15, (1 + t) / (10 + t))
        expected.append(decay * expected[-1] + (1 - decay) * weight)
    kept = {}
    keep = lambda step: kept.update({step: averaged.module.weight.double()})  # noqa: E731
    config = OptimConfig(steps=4, lr=0.1, ema=0.15, validate_every=2)
    snapshots = Snapshots(3, keep)
    metrics = run_in(tmp_path / "averaged", averaged, config, snapshots)
    torch.testing.assert_close(kept, {3: expected[3]}, rtol=0, atol=1e-6)
    torch.testing.assert_close(averaged.module.weight.double(), expected[4], rtol=0, atol=1e-6)
    validated = [each["val_norm"] for each in lines(tmp_path / "averaged") if "val_norm" in each]
    assert validated == pytest.approx([float(expected[step].norm()) for step in (2, 4)])
    assert metrics == {"val_norm": validated[-1]}


def test_unused_parameters_do_not_keep_a_run_from_resuming(toy, run_in, tmp_path):
    """They never get a gradient, as a phi that no scale reaches."""
    config = OptimConfig(steps=2, checkpoint_every=1)
    first, rest = toy(), toy()
    for objective in (first, rest):
        objective.module.unused = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(Interrupted):
        run_in(tmp_path, stop_before(first, 1), config)
    run_in(tmp_path, rest, config)
    assert rest.module.unused.item() == 1


def spoilt_value(loss, module):
    return loss * torch.nan


def spoilt_gradient(loss, module):
    return loss + (module.weight * 0).sum().sqrt()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(spoilt_value, "loss is nan"), (spoilt_gradient, "gradient norm is nan")],
)
def test_divergence_names_the_step_and_keeps_the_last_good_state(
    spoil, said, toy, run_in, tmp_path
):
    config = OptimConfig(steps=6, batch_size=4, checkpoint_every=3)
    state, good = tmp_path / "bad" / STATE_FILE, tmp_path / "good"
    said = f"^test: {said} at step 5; the last good state is {state}$"
    with pytest.raises(TrainingDiverged, match=said):
        run_in(tmp_path / "bad", toy(bad_step=4, spoil=spoil), config)
    with pytest.raises(Interrupted):
        run_in(good, stop_before(toy(), 4), config)
    assert state.read_bytes() == (good / STATE_FILE).read_bytes()
    healed = toy()
    optimizer = torch.optim.AdamW(healed.module.parameters())
    assert StateFile(state, "ours, 10 examples").load(healed.module, optimizer) == 3
    assert all(parameter.isfinite().all() for parameter in healed.module.parameters())


def test_divergence_before_the_first_state(toy, run_in, tmp_path):
    with pytest.raises(TrainingDiverged, match="at step 1; no state was saved"):
        run_in(tmp_path, toy(bad_step=0, spoil=spoilt_value), OptimConfig(steps=2))


def within_blocks_and_head(name):
    return name.startswith(("blocks.", "head_nm.", "head."))


@pytest.mark.parametrize(
    ("kind", "fields", "trains"),
    [
        ("var", {}, lambda name: True),
        ("sparsify", {"conversion": {"train": "ffn"}}, lambda name: ".ffn." in name),
        ("sparsify", {"conversion": {"train": "blocks+head"}}, within_blocks_and_head),
        ("router", {}, lambda name: ".router." in name),
        ("tune", {}, lambda name: ".ffn." in name),
    ],
)
def test_what_is_frozen_stays(kind, fields, trains, build, run_in, tmp_path):
    objective, config = build(kind, steps=1, weight_decay=0.1, **fields)
    before = {name: p.detach().clone() for name, p in objective.var.named_parameters()}
    run_in(tmp_path, objective, config)
    after = dict(objective.var.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if trains(name)}


def test_the_bar_says_that_it_validates(run_in, toy, tmp_path, capfd):
    run_in(tmp_path, toy(), OptimConfig(steps=2, validate_every=1), progress=True)
    shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
    during = [line for line in shown if line.startswith("test, validating:")]
    assert ["1/2" in during[0], "2/2" in during[-1]] == [True, True]
    assert shown[-1].startswith("test: 100%")
