"""What is done is skipped; what changed, broke or belongs elsewhere is not taken for done."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmoe_var.checkpoints.load import weights_file
from dmoe_var.checkpoints.pretrained import from_pretrained
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.errors import CheckpointError, ConfigError, InputError
from dmoe_var.experiment.graph import (
    StageResult,
    order,
    prepare,
    record_if_done,
    require,
    run_stage,
    run_through,
)
from dmoe_var.experiment.record import Record
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.layer import ExpertConfig
from dmoe_var.report import records
from dmoe_var.stages import evaluate, export
from dmoe_var.stages.parts import calibration_bench, loaded

TRAINING = ["train_vqvae", "train_var", "sparsify", "split", "train_router"]


def through(experiment, last):
    """Runs to the last stage; (stage, whether it was done) of each."""
    seen = []
    run_through(experiment, last, lambda *each: seen.append(each))
    return seen


def test_order(make_experiment):
    for last, stages in (("split", TRAINING[:4]), ("sweep", [*TRAINING, "sweep"])):
        assert order(make_experiment(), last) == stages
    experiment = make_experiment(changes={"evaluate.model": "dense"})
    assert order(experiment, "evaluate") == ["train_vqvae", "train_var", "evaluate"]


def test_done_stages_are_skipped(make_experiment, trained, no_work):
    experiment = make_experiment(trained, {"sparsify.log_every": 1, "selection.tau": 0.7})
    assert through(experiment, "train_router") == [(stage, True) for stage in TRAINING]


def test_a_changed_stage_and_those_after_it_run(make_experiment, runs):
    experiment = make_experiment(runs, {"sparsify.alpha": 0.5})
    done = [True, True, False, False, False]
    assert through(experiment, "train_router") == list(zip(TRAINING, done, strict=True))
    assert through(experiment, "train_router") == [(stage, True) for stage in TRAINING]
    assert through(make_experiment(runs), "train_router") == [(stage, True) for stage in TRAINING]


def test_an_edited_experiment_runs_again_in_its_folder(make_experiment, runs):
    """If it fails, what it replaces is not done either: the old record goes first."""
    experiment = make_experiment(runs, edited={"split.router_hidden": 3})
    assert experiment.folder("split") == make_experiment(runs).folder("split")

    def fail(experiment):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(experiment, "split", fail)
    assert not (experiment.folder("split") / "result.json").exists()
    assert through(experiment, "train_router")[-2:] == [("split", False), ("train_router", False)]
    assert record_if_done(make_experiment(runs), "split") is None


def test_record(make_experiment, trained):
    experiment = make_experiment(trained)
    record = Record.read(experiment.folder("sparsify") / "result.json")
    assert (record.stage, record.variant, record.seed) == ("sparsify", "default", 0)
    assert experiment.relevant("sparsify").items() <= record.config.items()
    assert record.config["evaluate.num_samples"] == experiment.config.evaluate.num_samples
    assert record.fingerprint == experiment.fingerprint("sparsify")
    assert all(isinstance(value, int | float) for value in record.metrics.values())
    assert {"val_ce", "val_hoyer", "val_inactive_layer0_scale3"} <= record.metrics.keys()
    files = sorted(path.name for path in experiment.folder("sparsify").iterdir())
    assert files == ["checkpoint", "config.yaml", "metrics.jsonl", "result.json"]
    logged = (experiment.folder("sparsify") / "metrics.jsonl").read_text().splitlines()
    trained = {k: v for k, v in record.metrics.items() if not k.startswith("tokens_")}
    assert json.loads(logged[-1]) == {"step": 2, **trained}
    assert record.metrics["tokens_unreadable"] == 0


def run_twice(experiment, stage, function):
    """In two threads that start together, as two processes would; their records."""
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run_stage, experiment, stage, function) for _ in range(2)]
        return [each.result() for each in both]


@pytest.mark.parametrize("stage", ["train_vqvae", "evaluate"])
def test_the_same_stage_twice_at_once(make_experiment, runs, capfd, stage):
    """The second waits, says so, and finds it done."""
    experiment, ran = make_experiment(runs, edited={"seed": 1}), []

    def slow(experiment):
        ran.append(1)
        until_said(capfd)
        return StageResult({})

    for upstream in order(experiment, stage)[:-1]:
        run_stage(experiment, upstream, lambda experiment: StageResult({}))
    first, second = run_twice(experiment, stage, slow)
    assert (ran, first) == ([1], second)
    assert ".lock" not in {path.name for path in experiment.folder(stage).iterdir()}


def until_said(capfd):
    """Waits until another thread says that it waits."""
    said, end = "", time.monotonic() + 120
    while "waiting for another run" not in said:
        assert time.monotonic() < end, said
        time.sleep(0.01)
        said += capfd.readouterr().err


def test_what_always_runs_takes_turns(make_experiment, runs):
    experiment, events = make_experiment(runs), []

    def slow(experiment):
        events.append("starts")
        time.sleep(0.05)
        events.append("ends")
        return StageResult({})

    run_twice(experiment, "export", slow)
    assert events == ["starts", "ends"] * 2


def test_stages_within_a_stage_do_not_wait_for_themselves(make_experiment, tmp_path):
    experiment, result = make_experiment(tmp_path), StageResult({})

    def outer(experiment):
        run_stage(make_experiment(tmp_path, {"seed": 3}), "train_vqvae", lambda experiment: result)
        run_stage(experiment, "train_vqvae", lambda experiment: result)
        return result

    run_stage(experiment, "train_vqvae", outer)
    assert record_if_done(experiment, "train_vqvae") is not None


@pytest.mark.parametrize("content", [b"\0" * 500, b"{}", b'{"schema_version": 1, "sta'])
def test_a_record_that_a_crash_left_broken(make_experiment, runs, capsys, content):
    """The stage is not done: it runs again, with a note; what builds on it says what to do."""
    experiment = make_experiment(runs)
    path = experiment.folder("train_vqvae") / "result.json"
    path.write_bytes(content)
    said = r"result\.json: .*; run scripts/train_vqvae\.py"
    with pytest.raises(InputError, match=said) as caught:
        require(experiment, "train_vqvae")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err.count("\n") == 1
    record = run_stage(experiment, "train_vqvae", lambda experiment: StageResult({"found": 1.0}))
    assert Record.read(path) == record
    assert record_if_done(experiment, "train_vqvae").metrics == {"found": 1.0}


def test_a_record_of_a_newer_version_stays(make_experiment, runs):
    experiment = make_experiment(runs)
    path = experiment.folder("train_vqvae") / "result.json"
    newer = json.dumps({**json.loads(path.read_text()), "schema_version": 2})
    path.write_text(newer)
    for attempt in (record_if_done, require, run_stage):
        with pytest.raises(InputError, match=f"schema_version=2.*remove {path.parent}"):
            attempt(experiment, "train_vqvae")
    assert path.read_text() == newer


def test_a_record_that_cannot_be_read_now_is_not_made_again(make_experiment, runs, monkeypatch):
    """A network's file system that fails for a while must not cost what is done."""
    experiment = make_experiment(runs)

    def read_text(path, encoding):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(InputError, match=r"result\.json: cannot be read \(Input/output error\)"):
        run_stage(experiment, "train_vqvae", lambda experiment: pytest.fail("it runs"))


def test_broken_records_beside_others_are_left_out(make_experiment, runs, capsys):
    """Of what is told of all the records of a stage."""
    experiment = make_experiment(runs)
    path = experiment.root / "evaluate" / "seed=9-0a1b2c3d" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert export.measured(experiment) == []
    (row,) = [row for row in records.stages(experiment) if row["name"] == "evaluate"]
    assert row["state"] == "missing"
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: ")
    assert said.count("\n") == 1


def test_leftover_state_of_a_done_stage_goes(make_experiment, runs, no_work):
    """Killed between its record and the removal of its state."""
    state = make_experiment(runs).folder("sparsify") / "state.safetensors"
    state.write_bytes(b"")
    run_stage(make_experiment(runs), "sparsify")
    assert not state.exists()


def test_a_stage_needs_those_before_it(make_experiment, tmp_path):
    experiment = make_experiment(tmp_path)
    folder = experiment.folder("train_vqvae")
    message = f"train_vqvae is not done in {folder}; run scripts/train_vqvae.py or scripts/pipeline"
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run_stage(experiment, "train_var")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_with_another_configuration(make_experiment, runs):
    experiment = make_experiment(runs, edited={"sparsify.alpha": 0.5, "train_var.lr": 0.02})
    message = "sparsify.alpha is 0.5, there 0.0001; train_var.lr is 0.02, there 0.001"
    with pytest.raises(InputError, match=message) as caught:
        require(experiment, "sparsify")
    assert str(experiment.folder("sparsify")) in str(caught.value)
    assert require(make_experiment(runs), "sparsify").stage == "sparsify"


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("harm", [cut_short, Path.unlink])
def test_broken_checkpoint_of_a_done_stage(make_experiment, runs, harm, name):
    experiment = make_experiment(runs)
    path = experiment.folder("sparsify") / "checkpoint" / name
    harm(path)
    for attempt in (record_if_done, require, run_stage, through):
        with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
            attempt(experiment, "sparsify")
        assert "\n" not in str(caught.value)


def without_a_key(file):
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    del tensors["head.bias"]
    save_file(tensors, file, about)


@pytest.mark.parametrize(
    ("harm", "file", "message"),
    [
        (without_a_key, "model.safetensors", "missing 1 keys: head.bias"),
        (Path.unlink, "config.json", "No such file"),
        (cut_short, "config.json", "cut short"),
    ],
)
def test_incomplete_checkpoint(make_experiment, runs, harm, file, message):
    """Found by the stage that builds on it."""
    experiment = make_experiment(runs, {"split.router_hidden": 3})
    path = experiment.folder("sparsify") / "checkpoint" / file
    harm(path)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*{message}"):
        run_stage(experiment, "split")


@pytest.mark.parametrize(
    ("stage", "kind", "load", "change", "message"),
    [
        ("train_vqvae", VQVAE, loaded.vqvae, {"vocab_size": 16}, "vocab_size is 16, .* says 32"),
        ("sparsify", VAR, loaded.sparse, {"depth": 2}, "depth is 2, .* says 1"),
        (
            "train_router",
            VAR,
            loaded.split,
            {"experts": ExpertConfig(64, 4)},
            r"expert_size=64.* says .*=32",
        ),
    ],
)
def test_checkpoint_of_another_configuration(
    make_experiment, runs, stage, kind, load, change, message
):
    experiment = make_experiment(runs)
    other = kind(replace(load(experiment).config, **change))
    save_checkpoint(experiment.folder(stage) / "checkpoint", other)
    with pytest.raises(CheckpointError, match=f"another configuration: .*{message}") as caught:
        load(experiment)
    assert str(experiment.folder(stage)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_go_from_stage_to_stage(make_experiment, runs):
    """ReLU from GELU; experts that together are the ReLU FFNs; then nothing but routers moves."""
    experiment = make_experiment(runs)
    dense, sparse = loaded.dense(experiment), loaded.sparse(experiment)
    assert (dense.config.activation, sparse.config.activation) == ("gelu", "relu")
    split, routed = loaded.split(experiment, "split"), loaded.split(experiment)
    labels, teacher = torch.tensor([3, 10]), torch.randn(2, 29, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            split(labels, teacher), sparse(labels, teacher), rtol=1e-4, atol=1e-5
        )
    before, after = split.state_dict(), routed.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".router." in name}


def test_fine_tuning_starts_from_the_dense_model(make_experiment, runs):
    """At a rate at which nothing moves, its weights are what comes out."""
    still = {"sparsify.lr": 1e-12, "sparsify.lr_end": 0.0, "sparsify.steps": 1}
    experiment = make_experiment(runs, still)
    run_stage(experiment, "sparsify")
    expected, found = loaded.dense(experiment).state_dict(), loaded.sparse(experiment).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_trained_routers_are_what_is_used(make_experiment, runs):
    """Joined, exported, calibrated, evaluated: never those that the split left untrained."""
    experiment = make_experiment(runs)
    expected = load_file(experiment.folder("train_router") / "checkpoint" / "model.safetensors")
    routers = {name: tensor for name, tensor in expected.items() if ".router." in name}
    before = load_file(experiment.folder("split") / "checkpoint" / "model.safetensors")
    assert all(not torch.equal(before[name], tensor) for name, tensor in routers.items())
    run_stage(experiment, "export")
    used = {
        "joined": loaded.dynamic(experiment).moe,
        "exported": from_pretrained(experiment.folder("export") / export.FOLDER).moe,
        "calibrated": calibration_bench.CalibrationBench(experiment).model.moe,
        "evaluated": evaluate.Bench(experiment).model(experiment).moe,
    }
    for name, moe in used.items():
        found = moe.state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in routers.items()), name


def without_speeds(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith("_per_s")}


def test_other_weights_behind_a_name_are_noticed(make_experiment, runs, tmp_path):
    """The content of a given file counts, not its name alone."""
    folder = tmp_path / "var"
    shutil.copytree(make_experiment(runs).folder("train_var") / "checkpoint", folder)
    experiment = make_experiment(tmp_path / "new", {"base.var": str(folder)})
    before = experiment.fingerprint("sparsify")
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"] += 1
    save_file(tensors, folder / "model.safetensors")
    assert experiment.fingerprint("sparsify") != before


def test_a_checkpoint_of_another_configuration_is_noticed(make_experiment, runs, tmp_path):
    """Same shapes, another alpha: only the fingerprint in the file tells."""
    ours, other = (make_experiment(runs, c) for c in ({}, {"sparsify.alpha": 0.5}))
    through(other, "sparsify")
    shutil.rmtree(ours.folder("sparsify") / "checkpoint")
    shutil.copytree(other.folder("sparsify") / "checkpoint", ours.folder("sparsify") / "checkpoint")
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        run_stage(ours, "sparsify")


def test_base_models_may_be_given(make_experiment, runs, tmp_path):
    """Then they are validated, not trained, and are what later stages read."""
    given = {
        f"base.{kind}": str(make_experiment(runs).folder(stage) / "checkpoint")
        for kind, stage in (("vqvae", "train_vqvae"), ("var", "train_var"))
    }
    experiment = make_experiment(tmp_path / "new", given)
    through(experiment, "sparsify")
    for kind, stage in (("vqvae", "train_vqvae"), ("var", "train_var")):
        record = Record.read(experiment.folder(stage) / "result.json")
        assert record.about["source"] == given[f"base.{kind}"]
        trained = Record.read(make_experiment(runs).folder(stage) / "result.json").metrics
        assert without_speeds(record.metrics) == pytest.approx(without_speeds(trained), rel=1e-5)
        file = weights_file(given[f"base.{kind}"], kind)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert record.weights[f"base.{kind}"] == digest
        assert not (experiment.folder(stage) / "checkpoint").exists()
    expected, found = (loaded.sparse(w).state_dict() for w in (make_experiment(runs), experiment))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_given_bases_that_do_not_fit(make_experiment, runs):
    source = str(make_experiment(runs).folder("train_var") / "checkpoint")
    for changes, message in (
        ({"base.vqvae": "no/where"}, "no/where: no such file"),
        ({"base.var": "no/where"}, "no/where: no such file"),
        ({"base.var": source, "var.depth": 2}, "depth is 1, the configuration says 2"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            through(make_experiment(runs, changes), "train_var")
        assert "\n" not in str(caught.value)


def test_unknown_stage(make_experiment):
    with pytest.raises(ValueError, match="stage='nothing' is none of benchmark, "):
        run_stage(make_experiment(), "nothing")


@pytest.fixture
def settings_of_torch():
    """Puts the process's settings back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("settings_of_torch")
def test_prepare_sets_up_the_process(make_experiment):
    prepare(make_experiment(changes={"threads": 3, "deterministic": True}))
    assert torch.get_num_threads() == 3
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("stage", ["sample", "evaluate", "sweep", "calibrate", "maps"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling.cuda_graphs": True}, "sampling.cuda_graphs=true: .*device=cpu; allowed: false"),
        (
            {"moe.impl": "triton"},
            r"^moe.impl=triton needs .*; allowed: auto, reference, grouped",
        ),
    ],
)
def test_what_the_device_cannot_do_is_refused_before_any_work(
    make_experiment, monkeypatch, tmp_path, stage, changes, said
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=said):
        through(make_experiment(tmp_path, {"device": "cpu", **changes}), stage)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.usefixtures("settings_of_torch")
def test_a_device_that_is_not_there_is_found_before_any_work(make_experiment):
    with pytest.raises(InputError, match="device=cuda"):
        prepare(make_experiment(changes={"device": "cuda", "deterministic": True}))
