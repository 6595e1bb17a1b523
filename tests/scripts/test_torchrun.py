"""Scripts in two processes do what they do in one: the same models, records, images and lines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmoe_var import load_var

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TWO = "../tests/scripts/two_processes"
"""What `launch` takes for two processes."""
STAGES = ("train_vqvae", "train_var", "sparsify", "split", "train_router")
LENGTH = (
    "steps=3", "batch_size=5", "micro_batch_size=2", "log_every=1", "validate_every=2",
    "checkpoint_every=2",
)  # fmt: skip
SMALL = [
    "device=cpu", "threads=1", "progress=false", "moe.scales=[4,5,6]", "sampling.batch_size=3",
    "evaluate.num_samples=20",
    *(f"{stage}.{key}" for stage in ("sparsify", "train_router") for key in LENGTH),
]  # fmt: skip
"""The packaged models of digits, converted in three steps; parts of an evaluation: seven."""
PIPELINE = ("until=train_router", *SMALL)


@pytest.fixture(scope="module")
def made(launch, tmp_path_factory):
    """made(*script): a folder in which it made all up to the routers, and what it said."""

    def made(*script):
        folder = tmp_path_factory.mktemp("made")
        finished = launch(*script, *PIPELINE, cwd=folder)
        assert (finished.status, finished.stderr) == (0, "")
        return folder, finished.stdout

    return made


@pytest.fixture(scope="module")
def one(made):
    return made("pipeline")


@pytest.fixture(scope="module")
def two(made):
    return made(TWO, "pipeline")


def of_stage(folder, stage):
    (found,) = (folder / "runs" / "digits" / stage).iterdir()
    return found


def record(folder, stage):
    return json.loads((of_stage(folder, stage) / "result.json").read_text())


def weights(folder, stage):
    """What was trained, one vector a tensor; constants, which hold -inf, left out."""
    tensors = load_file(of_stage(folder, stage) / "checkpoint" / "model.safetensors")
    return {n: t.double().flatten() for n, t in tensors.items() if not n.startswith("attn_bias")}


def lines(folder, stage):
    """metrics.jsonl without the times."""
    text = (of_stage(folder, stage) / "metrics.jsonl").read_text()
    return [{**json.loads(line), "step_s": 0} for line in text.splitlines()]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_two_processes_say_and_leave_what_one_does(one, two):
    """Each line once, the same files, nothing temporary."""
    assert two[1] == one[1]
    assert [line.partition(":")[0] for line in two[1].splitlines()] == list(STAGES)
    assert files(two[0]) == files(one[0])
    assert [name for name in files(two[0]) if "tmp" in name] == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_records(one, two, stage):
    ours, theirs = (record(folder, stage) for folder, _ in (two, one))
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["fingerprint"] == theirs["fingerprint"]
    same = {n: v for n, v in theirs["metrics"].items() if not n.endswith("_per_s")}
    found = {name: ours["metrics"].get(name) for name in same}
    assert found == pytest.approx(same, rel=1e-2, abs=1e-3)
    if stage not in ("sparsify", "train_router"):
        return
    logged = lines(two[0], stage), lines(one[0], stage)
    for line, expected in zip(*logged, strict=True):
        assert line == pytest.approx(expected, rel=1e-2, abs=1e-3)
    assert logged[0][0] == pytest.approx(logged[1][0], rel=1e-5)


@pytest.mark.parametrize(("stage", "before"), [("sparsify", None), ("train_router", "split")])
def test_the_same_weights(one, two, stage, before):
    """The same micro-batches, summed in float64: whoever had which, the last bit is the same."""
    assert_trained_alike(two[0], one[0], stage, before)


def assert_trained_alike(ours_in, theirs_in, stage, before):
    ours, theirs = weights(ours_in, stage), weights(theirs_in, stage)
    starts = [
        weights(folder, before) if before else dense_weights(theirs)
        for folder in (ours_in, theirs_in)
    ]
    assert ours.keys() == theirs.keys()
    went = {name: (theirs[name] - starts[1][name]).norm() for name in theirs}
    trained = [name for name in went if went[name] > 0]
    assert len(trained) >= 8
    assert [n for n in trained if (ours[n] - theirs[n]).abs().max() > 1e-6] == []
    rest = [name for name in went if name not in trained]
    assert [n for n in rest if not torch.equal(ours[n], starts[0][n])] == []


def dense_weights(like):
    state = load_var("digits").state_dict()
    return {name: state[name].double().flatten() for name in like}


def test_the_same_images(launch, two, tmp_path):
    """Seven parts over two processes: one has a part more, the last is smaller. What two did before
    is done for one as well."""
    said = []
    for name, script in (("by_one", ("evaluate",)), ("by_two", (TWO, "evaluate"))):
        folder = shutil.copytree(two[0], tmp_path / name)
        finished = launch(*script, *SMALL, cwd=folder)
        assert (finished.status, finished.stderr) == (0, "")
        said.append(finished.stdout.split("sampling_ms_per_image")[0])
    by_one, by_two = (of_stage(tmp_path / name, "evaluate") for name in ("by_one", "by_two"))
    file = "samples.npz"
    assert (by_two / file).read_bytes() == (by_one / file).read_bytes()
    assert files(by_two) == files(by_one)
    assert record(tmp_path / "by_two", "evaluate")["processes"] == 2
    assert said[0] == said[1]
    assert said[1].count("evaluate: ") == 1


def test_what_is_wrong_is_said_once(launch, tmp_path):
    """By the main process, before the others, and before anything is written."""
    finished = launch(TWO, "train_vqvae", "base.vqvae=null", "threads=1", cwd=tmp_path)
    assert (finished.status, finished.stdout) == (2, "")
    said = "train_vqvae trains in one process, torchrun started 2: run it by itself first"
    assert finished.stderr.count(said) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    """Of all the digits; the other tests start two processes in a way of their own."""
    by_one, by_two = tmp_path / "one", tmp_path / "two"
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    for folder, started in ((by_one, ()), (by_two, torchrun)):
        folder.mkdir()
        command = [sys.executable, *started, SCRIPTS / "pipeline.py", *PIPELINE]
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(STAGES)
    assert record(by_two, "train_router")["processes"] == 2
    left = [name for name in files(by_two) if not name.endswith("journal_1.jsonl")]
    assert left == files(by_one)  # each process that codes pictures has a journal of its own
    assert_trained_alike(by_two, by_one, "sparsify", None)
    assert_trained_alike(by_two, by_one, "train_router", "split")
