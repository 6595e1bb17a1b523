"""SIGKILL at any moment, and started again: bitwise the weights of a run that was left alone."""

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


@pytest.mark.parametrize(
    ("stage", "moment", "stride"),
    [
        ("train_vqvae", WRITE, 1),
        ("train_var", STEP, 2),
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
    assert logged(ours) == logged(expected)
    assert {p.name for p in ours.iterdir()} - {p.name for p in expected.iterdir()} == set()
