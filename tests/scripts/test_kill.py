"""SIGKILL at any moment, and started again: bitwise the weights of a run that was left alone."""

from __future__ import annotations

import itertools
import json
import shutil
import signal

import pytest

WRITE, STEP = "os.replace", "torch.optim.AdamW.step"


def lines(folder):
    """metrics.jsonl without the times."""
    text = (folder / "metrics.jsonl").read_text()
    return [{**json.loads(line), "step_s": None} for line in text.splitlines()]


@pytest.mark.parametrize(
    ("stage", "moment", "stride"),
    [
        ("train_vqvae", WRITE, 1),
        ("train_var", WRITE, 2),
        ("train_var", STEP, 2),
        ("sparsify", STEP, 2),
        ("train_router", STEP, 2),
    ],
)
def test_killed_again_and_again(launch, tiny, undisturbed, tmp_path, stage, moment, stride):
    """Killed before the first (stride-th) file it writes or step it takes, before a later one at
    the next start, a still later one at the one after it, until a start gets through."""
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    (expected,) = (undisturbed / "runs" / "digits" / stage).iterdir()
    ours = tmp_path / "runs" / "digits" / stage / expected.name
    shutil.rmtree(ours)
    if stage == "train_var":
        shutil.rmtree(tmp_path / "runs" / "cache")
    for n in itertools.count(stride, stride):
        finished = launch(stage, *tiny, cwd=tmp_path, kill=(moment, n))
        if finished.status != -signal.SIGKILL:
            break
        assert not (ours / "result.json").exists()
    assert (finished.status, finished.stderr) == (0, "")
    assert n >= 4
    file = "checkpoint/model.safetensors"
    assert (ours / file).read_bytes() == (expected / file).read_bytes()
    assert lines(ours) == lines(expected)
    metrics = [json.loads((f / "result.json").read_text())["metrics"] for f in (ours, expected)]
    ours_now, once = (
        {name: value for name, value in each.items() if not name.endswith("_per_s")}
        for each in metrics
    )
    assert ours_now == once
    assert {p.name for p in ours.iterdir()} - {p.name for p in expected.iterdir()} == set()
