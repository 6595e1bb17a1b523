"""Multiruns as jobs, from the command line."""

from __future__ import annotations

import json
import shutil

import pytest

SWEEP = ["evaluate.num_samples=20", "sampling.batch_size=10", "sweep.last=[]", "sweep.seeds=[0]"]

WRONG = [
    (["launcher=slurm"], "launcher.cluster=slurm: jobs are for multiruns; give -m too"),
    (["-m", "launcher=slurm,local"], "launcher: the points of a multirun must have one and the"),
    (["-m", "launcher=slurm", "seed=0,-1"], "seed=-1: "),
]


@pytest.mark.parametrize(("arguments", "line"), WRONG)
def test_wrong_jobs(launch, tmp_path, arguments, line):
    finished = launch("sweep", *arguments, cwd=tmp_path)
    assert (finished.status, finished.stdout) == (2, "")
    assert finished.stderr.count("\n") == 1
    assert line in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_measures_no_part(launch, tmp_path):
    finished = launch("pipeline", "sweep.part=1", cwd=tmp_path)
    assert finished.status == 2
    assert finished.stderr.startswith("sweep.part=1: a part of a sweep is measured by scripts/")


def test_no_cluster(launch, tmp_path):
    if shutil.which("srun"):
        pytest.skip("this machine has SLURM")
    finished = launch("sweep", "-m", "launcher=slurm", "seed=0,1", cwd=tmp_path)
    assert finished.status == 2
    assert finished.stderr.startswith("launcher.cluster=slurm: ")
    assert finished.stderr.count("\n") == 1


def test_a_part_is_for_the_sweep_alone_to_measure(launch, tmp_path):
    """Which goes on to look for its models."""
    part = ("sweep.parts=2", "sweep.part=2", "base.vqvae=nowhere.pth")
    finished = launch("sweep", *part, cwd=tmp_path)
    assert (finished.status, finished.stdout) == (2, "")
    assert "nowhere.pth" in finished.stderr
    assert "sweep.part" not in finished.stderr
    finished = launch("sweep", *part, "sweep.lists.mine=[0.1,0.2]", cwd=tmp_path)
    assert finished.status == 2
    assert "sweep.lists.mine" in finished.stderr


def results(folder):
    """What every point is and costs, by its name."""
    paths = folder.glob("evaluate/*/result.json")
    return {
        record["variant"]: (
            record["fingerprint"], record["config"], record["metrics"]["flops_gmac"]
        )
        for record in (json.loads(path.read_text()) for path in paths)
    }  # fmt: skip


@pytest.mark.slow
def test_a_sweep_as_jobs(launch, tiny, undisturbed, tmp_path):
    """Two parts as processes at once, then joined: as in one run; a failing job's line is ours."""
    for name in ("jobs", "alone"):
        shutil.copytree(undisturbed / "runs", tmp_path / name / "runs")
    jobs = ["-m", "launcher=slurm", "launcher.cluster=local", "launcher.hours=0.1"]
    parts = ["sweep.parts=2", "sweep.part=1,2"]
    failed = launch("sweep", *jobs, *parts, *tiny, *SWEEP, "name=none", cwd=tmp_path / "jobs")
    assert failed.status == 2
    assert "train_router is not done in runs/none" in failed.stderr
    started = launch("sweep", *jobs, *parts, *tiny, *SWEEP, cwd=tmp_path / "jobs")
    assert (started.status, started.stderr) == (0, "")
    assert started.stdout.splitlines() == [
        "2 jobs (local), logs under runs/multirun",
        "sweep: part 1 of 2, 2 points",
        "sweep: part 2 of 2, 1 points",
    ]
    ours, theirs = (tmp_path / name / "runs" / "digits" for name in ("jobs", "alone"))
    assert not (ours / "sweep").exists()
    points = {path: path.stat().st_mtime_ns for path in ours.glob("evaluate/*/result.json")}
    assert len(points) == 3
    for name in ("jobs", "alone"):
        finished = launch("sweep", *tiny, *SWEEP, cwd=tmp_path / name)
        assert (finished.status, finished.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in ours.glob("evaluate/*/result.json")} == points
    assert results(ours) == results(theirs)
