"""result.json: one schema, read back as it was, or refused in one line."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
import torch

from dmoe_var.errors import DataError
from dmoe_var.experiment.graph import StageResult, run_stage
from dmoe_var.experiment.record import RESULT_FILE, SCHEMA_VERSION, Record

RECORD = Record(
    stage="evaluate",
    variant="default",
    fingerprint="0123456789abcdef",
    metrics={"fid": 1.25, "flops_gmac": 1e-3, "tiny": 5e-324},
    config={"sampling.cfg": 1.5, "moe.scales": [2, 3]},
    seed=3,
    num_samples=20,
    dtype="float32",
    started="2026-01-01T00:00:00+00:00",
    ended="2026-01-01T00:00:01+00:00",
    device="cpu",
    threads=1,
    git_commit="unknown",
    libraries={"torch": "2.6"},
    about={"settings": [{"tau": [0.1]}]},
)


@pytest.fixture
def path(tmp_path):
    RECORD.write(tmp_path)
    return tmp_path / RESULT_FILE


def test_round_trip(path):
    assert Record.read(path) == RECORD
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION
    assert [p.name for p in path.parent.iterdir()] == [RESULT_FILE]


def without(*names):
    return lambda content: {k: v for k, v in content.items() if k not in names}


BROKEN = [
    (lambda content: [content], "schema_version=None, expected 1"),
    (lambda content: {**content, "schema_version": 2}, "schema_version=2, expected 1"),
    (without("seed"), "seed"),
    (lambda content: {**content, "sead": 1}, "sead"),
    (lambda content: {**content, "about": None}, "about=None"),
    (lambda content: {**content, "metrics": {"loss": "low"}}, "metrics={'loss': 'low'}: Input"),
    (lambda content: {**content, "seed": "0"}, "seed='0'"),
    (lambda content: {**content, "config": {"a": 1}, "weights": ["base.var"]}, "weights="),
    (lambda content: {**content, "weights": {"base.var": 1}}, "weights={'base.var': 1}: Input"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken_content(path, change, message):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: .*{message}") as caught:
        Record.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xe4"])
def test_no_json(path, content):
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: cut short or no JSON") as caught:
        Record.read(path)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Record.read(tmp_path / RESULT_FILE)


@pytest.mark.parametrize(
    "given", [{}, {"seed": 0, "dtype": "float16", "num_samples": 7, "about": {"note": "x"}}]
)
def test_a_record_says_how_it_was_made(make_experiment, tmp_path, monkeypatch, given):
    """By what ran, where a stage says it, and else by the configuration; 0 is a seed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    experiment = make_experiment(tmp_path, {"seed": 3, "dtype": "bfloat16"})
    made = run_stage(experiment, "train_vqvae", lambda _: StageResult({"loss": 1.5}, **given))
    assert Record.read(experiment.folder("train_vqvae") / RESULT_FILE) == made
    expected = {
        "stage": "train_vqvae", "variant": experiment.variant("train_vqvae"), "threads": 5,
        "fingerprint": experiment.fingerprint("train_vqvae"), "metrics": {"loss": 1.5},
        "processes": 1, "config": experiment.config.leaves, "seed": 3, "dtype": "bfloat16",
        "num_samples": 0, "weights": {}, "about": {},
    }  # fmt: skip
    assert {key: getattr(made, key) for key in expected} == {**expected, **given}
    assert made.started <= made.ended
    assert made.libraries["torch"] == metadata.version("torch")
