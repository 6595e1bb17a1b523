"""Ended at any moment and started again: bitwise the weights of a run that was left alone."""

from __future__ import annotations

import itertools
import json
import shutil
import signal

import pytest

WRITE, STEP = "os.replace", "torch.optim.AdamW.step"


def logged(folder):
    """metrics.jsonl and the record's metrics, without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines.append(json.loads((folder / "result.json").read_text())["metrics"])
    times = ("step_s", "_per_s")
    return [{k: v for k, v in line.items() if not k.endswith(times)} for line in lines]


LENGTH = ("steps=6", "batch_size=8", "log_every=1", "validate_every=4", "checkpoint_every=2")
MORE = {
    "train_classifier": [f"train_classifier.{key}" for key in (*LENGTH, "epochs=null", "width=8")],
    "tune_experts": [f"tune_experts.{key}" for key in (*LENGTH, "tau=[0.5]")],
}
"""Options of stages that are not in `undisturbed`."""


@pytest.mark.parametrize(
    ("stage", "moment", "stride", "number"),
    [
        ("train_vqvae", WRITE, 1, signal.SIGKILL),
        ("train_var", STEP, 2, signal.SIGKILL),
        ("train_router", STEP, 2, signal.SIGKILL),
        ("train_router", STEP, 3, signal.SIGTERM),
        ("sparsify", STEP, 2, signal.SIGKILL),
        ("train_classifier", STEP, 2, signal.SIGKILL),
        ("tune_experts", STEP, 2, signal.SIGKILL),
    ],
)
def test_killed_again_and_again(launch, tiny, undisturbed, tmp_path, stage, moment, stride, number):
    """Ended before the first (stride-th) file it writes or step it takes, before a later one at
    the next start, a still later one at the one after it, until a start gets through. SIGTERM is
    what `timeout` sends: the run ends in good order."""
    options, whole = [*tiny, *MORE.get(stage, [])], undisturbed
    if stage in MORE:
        whole = tmp_path / "whole"
        shutil.copytree(undisturbed / "runs", whole / "runs")
        assert launch(stage, *options, cwd=whole).status == 0
    shutil.copytree(whole / "runs", tmp_path / "runs")
    (expected,) = (whole / "runs" / "digits" / stage).iterdir()
    ours = tmp_path / "runs" / "digits" / stage / expected.name
    shutil.rmtree(ours)
    if stage == "train_var":
        shutil.rmtree(tmp_path / "runs" / "cache")
    for n in itertools.count(stride, stride):
        finished = launch(stage, *options, cwd=tmp_path, kill=(moment, n, number))
        if finished.status == 0:
            break
        assert finished.status == (-number if number == signal.SIGKILL else 128 + number)
        assert not (ours / "result.json").exists()
    assert finished.stderr == ""
    assert n >= 4
    file = "checkpoint/model.safetensors"
    assert (ours / file).read_bytes() == (expected / file).read_bytes()
    assert logged(ours) == logged(expected)
    assert {p.name for p in ours.iterdir()} - {p.name for p in expected.iterdir()} == set()
