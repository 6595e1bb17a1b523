"""Two processes train and validate as one does; float64, so that only wrong sums show."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.training.state import STATE_FILE

PROGRAM = Path(__file__).with_name("two_processes.py")
SECONDS = 300
REHEARSED = 2
"""Micro-batches that the main process tries before a run."""
LENGTH = {
    "steps": 4, "batch_size": 8, "log_every": 1, "validate_every": 2, "checkpoint_every": 2
}  # fmt: skip
FINE_TUNING = {"alpha": 0.1, "alpha_warmup": 0.5}
CASES = {
    "sparsify-3": ("sparsify", {**FINE_TUNING, "micro_batch_size": 3}, (2, 1)),
    "sparsify-1": ("sparsify", {**FINE_TUNING, "batch_size": 1}, (1, 0)),
    "router-halves": ("router", {"batch_size": 7}, (1, 1)),
}
"""Kind, fields of its configuration, and the micro-batches of each process in a step."""
KILLED = "sparsify-killed"
"""Before its fourth step, when two are stored; else it is sparsify-3."""


@pytest.fixture(scope="module")
def folder(vqvae, tokens, make_var, make_moe, tmp_path_factory):
    """What every case left behind, after all ran in two processes of their own."""
    folder = tmp_path_factory.mktemp("processes")
    var = make_var(num_classes=10, activation="relu", drop_path=0.2, label_drop=0.3)
    for name, model in (("vqvae", vqvae), ("var", var), ("moe", make_moe(var))):
        save_checkpoint(folder / name, model)
    stored = {}
    for name, tokens_of in zip(("training", "held_out"), tokens, strict=True):
        tokens_BL, labels_B = tokens_of.batch(torch.arange(len(tokens_of)))
        stored |= {f"{name}.tokens": tokens_BL, f"{name}.labels": labels_B}
    save_file(stored, folder / "tokens.safetensors")
    cases = [
        {"name": name, "kind": kind, "fields": {**LENGTH, **fields}, "stop": None}
        for name, (kind, fields, _) in CASES.items()
    ]
    cases.append({**cases[0], "name": KILLED, "stop": 3})
    (folder / "cases.json").write_text(json.dumps(cases))
    run_processes(folder)
    return folder


def run_processes(folder):
    """They end with their kill; a traceback before that fails here, and so do processes that wait
    for each other."""
    with subprocess.Popen(
        [sys.executable, PROGRAM, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            out, said = program.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            raise
    assert all((folder / name / "1" / "metrics.json").exists() for name in CASES), said
    assert json.loads(out.splitlines()[-1])[0] == -signal.SIGKILL, said


@pytest.fixture
def left(folder):
    """left(case, rank) -> its folder, weights, metrics and the number of micro-batches."""

    def left(case, rank):
        mine = folder / case / str(rank)
        num, metrics = json.loads((mine / "metrics.json").read_text())
        weights = load_file(mine / "weights.safetensors")
        return SimpleNamespace(run=mine / "run", weights=weights, metrics=metrics, num=num)

    return left


@pytest.fixture
def run_case(build, run_in):
    """run_case(case, folder, micro_batch_size) -> weights and metrics of one process, and the steps
    that it made."""

    def run_case(case, folder, micro_batch_size=None):
        kind, fields, _ = CASES[case]
        given = {**LENGTH, **fields, "micro_batch_size": micro_batch_size}
        objective, config = build(kind, dtype=torch.float64, **given)
        steps, loss = [], objective.loss
        objective.loss = lambda *args: steps.append(args[1]) or loss(*args)
        metrics = run_in(folder, objective, config)
        return SimpleNamespace(
            weights=objective.module.state_dict(), metrics=metrics, steps=set(steps)
        )

    return run_case


def lines(folder):
    """metrics.jsonl without the times."""
    text = (folder / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if name != "step_s"} for line in found]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(case, left, run_case, tmp_path):
    """Same weights, logged values and validation, also where one process has more micro-batches
    than the other, or the other none at all, and none to validate. The main one alone writes."""
    first, second, expected = left(case, 0), left(case, 1), run_case(case, tmp_path)
    num = [LENGTH["steps"] * of_step for of_step in CASES[case][2]]
    assert [first.num, second.num] == [REHEARSED + num[0], num[1]]
    assert_close(second.weights, first.weights, rtol=0, atol=0)
    assert_close(first.weights, expected.weights, rtol=0, atol=1e-9)
    assert first.metrics == second.metrics
    assert first.metrics == pytest.approx(expected.metrics, rel=1e-6)
    written = lines(first.run)
    assert [line["step"] for line in written] == [1, 2, 2, 3, 4, 4]
    for ours, theirs in zip(written, lines(tmp_path), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert sorted(path.name for path in first.run.iterdir()) == ["metrics.jsonl", STATE_FILE]
    assert list(second.run.iterdir()) == []


def test_two_killed_processes_go_on_in_one(folder, left, run_case):
    """From the second of four steps, though three were made, with other micro-batches."""
    run = folder / KILLED / "0" / "run"
    assert lines(run)[-1]["step"] == 3
    rest, expected = run_case("sparsify-3", run, micro_batch_size=5), left("sparsify-3", 0)
    assert rest.steps == {2, 3}
    assert_close(rest.weights, expected.weights, rtol=0, atol=1e-9)
    assert rest.metrics == pytest.approx(expected.metrics, rel=1e-6)
    assert [line["step"] for line in lines(run)] == [1, 2, 2, 3, 4, 4]
