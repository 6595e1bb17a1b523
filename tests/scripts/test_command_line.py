"""Command lines: what is wrong ends a script before any work, with one line and status 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
WRONG = [
    ("train_var", ["train_var.sped=1"], ("train_var.sped", "unknown key", "steps, epochs")),
    ("sparsify", ["no.such.section=1"], ("no.such.section", "unknown key")),
    ("pipeline", ["sparsify.alpha=-1"], ("sparsify.alpha=-1", "greater than or equal to 0")),
    ("evaluate", ["moe=huge"], ("moe=huge", "allowed: mini")),
    ("sweep", ["sweep.seeds=["], ("sweep.seeds",)),
    ("train_router", ["lr"], ("lr: no setting", "key=value")),
    ("train_router", ["seed=1", "--steps=5"], ("arguments: --steps=5", "key=value", "--help")),
    ("train_var", ["--cfg", "nonsense"], ("--cfg", "nonsense", "job", "key=value")),
    ("evaluate", ["tau=0.3"], ("tau=0.3: unknown key", "data, vqvae")),
    ("sample", ["tau=1.5"], ("selection.tau", "1.5", "less than or equal to 1")),
    ("sample", ["seeds=[1,1]"], ("sample.seeds: [1, 1] must be distinct",)),
    ("sample", ["classes=[3,'3']"], ("sample.classes=[3, '3']", "distinct")),
    ("sample", ["-m", "classes=3,10"], ("sample.classes: 10 must be within 0..9",)),
    ("sample", ["sample.model=both"], ("train_router is not done", "sample.model=dense")),
    ("train_var", ["-m", "seed=0,1", "train_var.lr=1e-3,-1"], ("train_var.lr=-1", "greater than")),
    ("evaluate", ["-m", "experiment=digits,digitz"], ("experiment=digitz", "allowed: cifar10, ")),
    ("sweep", ["sweep.lists.mine="], ("sweep.lists.mine='': must be", "0..1, or a list")),
    ("sample", ["seed=1", "tau=0.2\r"], ("'tau=0.2\\r'", "carriage return", "CRLF")),
    ("sample", ["sample.pretrained=/nope"], ("sample.pretrained=/nope: no such folder",)),
    ("sample", ["run_dir=caf\udce9"], ("run_dir=caf", "not UTF-8")),
    ("figures", ["figures.seeds=[9999999999]"], ("figures.seeds", "less than 2147483648")),
    ("sample", ["threads=99999999999"], ("threads=99999999999", "less than or equal to 1024")),
    ("train_var", ["-m", "seed=range(1,1)"], ("seed=range(1,1): not one point",)),
    ("train_var", ["-cd", "nowhere", "experiment=a"], ("--config-dir=nowhere: no such folder",)),
    ("train_var", ["-cn", "nowhere"], ("nowhere",)),
    ("train_var", ["hydra.run.dir=x"], ("hydra.run.dir=x", "are not read", "run_dir", "-cd")),
    ("train_var", ["--cfg", "job", "sede=1"], ("sede=1: unknown key", "did you mean seed?")),
    ("train_var", ["base.var="], ("base.var=''", "at least 1 character")),
    ("figures", ["-m", "figure=[3],[99]"], ("figures.figure=99: no figure", "allowed: all, 2a")),
    ("evaluate", ["recipe=/nope"], ("recipe=/nope: cannot be read",)),
    ("sample", ["sampling={foo: 1}"], ("sampling={foo: 1}: unknown key", "allowed: cfg")),
    (
        "figures",
        ["figure=5", "make=true", "figures.depths={3: nofile}"],
        ("figures.depths.3=nofile: no such file or folder", "digits_d2"),
    ),
    ("split", [], ("sparsify is not done", "scripts/sparsify.py")),
]
if not torch.cuda.is_available():
    no_device = ["-m", "device=cuda", "deterministic=true", "seed=0,1"]
    WRONG.append(("train_vqvae", no_device, ("device=cuda", "allowed: auto, cpu")))


def assert_refused(status, stdout, stderr, parts, folder):
    assert (status, stdout) == (2, ""), stderr
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    assert [part for part in parts if part not in stderr] == [], stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("script", "arguments", "parts"), WRONG)
def test_wrong_command_line(launch, tmp_path, script, arguments, parts):
    finished = launch(script, *arguments, cwd=tmp_path)
    assert_refused(*finished, parts, tmp_path)


BROKEN = {
    "tab": b"a:\n\t- b\n",
    "latin": b"# @package _global_\nname: d\xe9j\xe0\n",
    "bom": b"\xef\xbb\xbf# @package _global_\nname: a\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_configuration_is_one_line(launch, tmp_path, name):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / f"{name}.yaml").write_bytes(BROKEN[name])
    experiment = tmp_path / "work"
    experiment.mkdir()
    options = ("-cd", str(tmp_path / "conf"), f"experiment={name}")
    finished = launch("train_var", *options, cwd=experiment)
    assert_refused(*finished, (f"experiment={name}",), experiment)


def test_wandb_without_a_login(launch, tmp_path):
    home, experiment = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    experiment.mkdir()
    nobody = {"HOME": str(home), "NETRC": str(home / "none"), "WANDB_API_KEY": ""}
    finished = launch("train_vqvae", "wandb=online", cwd=experiment, env=nobody)
    assert_refused(*finished, ("wandb=online: no login", "wandb=offline"), experiment)


def test_pictures_that_cannot_be_fetched(launch, tmp_path):
    """Nobody answers; nothing was measured, and nothing that looks like pictures is left."""
    proxy = {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    asked = ("experiment=cifar10", "data=cifar10_download", f"data.root={tmp_path / 'data'}")
    given = (*asked, "evaluate.model=dense", "device=cpu", "threads=1")
    finished = launch("evaluate", *given, cwd=tmp_path, env=proxy)
    assert (finished.status, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert finished.stderr.startswith(
        f"data.kind=cifar10: {tmp_path / 'data'} (data.root) holds no"
    )
    assert "it cannot be fetched from" in finished.stderr
    assert not (tmp_path / "data").exists()
    assert not list(tmp_path.rglob("result.json"))


def test_a_stage_says_where_and_what(launch, tiny, undisturbed):
    """With a notebook's backend, which it hands down to the programs that it starts."""
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    finished = launch("split", *tiny, cwd=undisturbed, env=backend)
    (folder,) = (undisturbed / "runs" / "digits" / "split").iterdir()
    shown = f"split: {os.path.relpath(folder, undisturbed)}  num_experts=4  expert_size=32\n"
    assert finished == (0, shown, "")


def test_an_interrupt_keeps_the_state(launch, tiny, tmp_path):
    """Ctrl-C in the fifth step: one line, and the next start goes on from the fourth."""
    step = ["torch.optim.AdamW.step", 5, signal.SIGINT]
    finished = launch("train_vqvae", *tiny, cwd=tmp_path, kill=step)
    assert (finished.status, finished.stdout) == (130, "")
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("stopped (SIGINT); ")
    (folder,) = (tmp_path / "runs" / "digits" / "train_vqvae").iterdir()
    before = (folder / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in before) == 4
    finished = launch("train_vqvae", *tiny, cwd=tmp_path)
    assert (finished.status, finished.stderr) == (0, "")
    assert (folder / "metrics.jsonl").read_text().splitlines()[: len(before)] == before


def test_wrong_command_line_in_a_fresh_python(tmp_path):
    """Nor does anything that is imported on the way print."""
    command = [sys.executable, str(SCRIPTS / "sweep.py"), "sampling.cfg=-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    parts = ("sampling.cfg=-1.0 is not within [0, 1000]",)
    assert_refused(done.returncode, done.stdout, done.stderr, parts, tmp_path)


def test_what_hydra_shows(launch, tmp_path):
    finished = launch("sample", "--cfg", "job", "tau=0.3", cwd=tmp_path)
    assert (finished.status, finished.stderr) == (0, "")
    assert "per_class: 4" in finished.stdout
    assert list(tmp_path.iterdir()) == []


def test_pictures_without_experts(launch, tmp_path):
    """Of a fresh checkout: the base models that the package carries, by the short keys."""
    arguments = ("seeds=[0,5]", "tau=0.3", "classes=[8,3]", "sample.single_pngs=true", "device=cpu")
    finished = launch("sample", *arguments, "progress=false", "threads=1", cwd=tmp_path)
    assert (finished.status, finished.stderr) == (0, "")
    note, where = finished.stdout.splitlines()
    assert "there is no dynamic one yet: train_router is not done in runs/digits" in note
    assert where.startswith("sample: runs/digits/sample/")
    folder = tmp_path / where.removeprefix("sample: ")
    record = json.loads((folder / "result.json").read_text())
    config = {key: record["config"][key] for key in ("sample.classes", "sample.seeds")}
    assert config == {"sample.classes": [8, 3], "sample.seeds": [0, 5]}
    assert record["config"]["selection.tau"] == [0.3]
    found = {path.name for path in (folder / "dense").glob("*.png")}
    assert found == {f"class{c}_seed{s}_{j}.png" for c in (3, 8) for s in (0, 5) for j in range(4)}
    assert (folder / "grid.png").exists()


def snapshot(folder):
    """Every file's content and time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path, path.stat().st_mtime_ns, path.read_bytes()) for path in files]


def test_pipeline_skips_what_is_done(launch, tiny, undisturbed):
    before = snapshot(undisturbed)
    finished = launch("pipeline", "until=train_router", *tiny, cwd=undisturbed)
    assert (finished.status, finished.stderr) == (0, "")
    assert [line.split(",")[0] for line in finished.stdout.splitlines()] == [
        f"{stage}: done already"
        for stage in ("train_vqvae", "train_var", "sparsify", "split", "train_router")
    ]
    assert snapshot(undisturbed) == before


def test_multirun(launch, tiny, undisturbed, tmp_path):
    """A folder a point; the stages that they build on are shared."""
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    arguments = ("-m", *tiny, "sparsify.alpha=0,0.1", "sparsify.steps=1")
    finished = launch("sparsify", *arguments, cwd=tmp_path)
    assert (finished.status, finished.stderr) == (0, "")
    assert finished.stdout.count("sparsify: runs/digits/sparsify/") == 2
    records = [
        json.loads(path.read_text())["config"]
        for path in (tmp_path / "runs" / "digits" / "sparsify").glob("*/result.json")
    ]
    settings = sorted((r["sparsify.alpha"], r["sparsify.steps"]) for r in records)
    assert [s for s in settings if s[1] != 6] == [(0, 1), (0.1, 1)]


def test_a_broken_checkpoint_is_one_line(launch, tiny, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    (path,) = (tmp_path / "runs" / "digits" / "sparsify").glob("*/checkpoint/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    finished = launch("pipeline", "until=split", *tiny, cwd=tmp_path)
    assert finished.status == 2
    assert finished.stderr.count("\n") == 1
    assert f"{os.path.relpath(path, tmp_path)}: missing, cut short" in finished.stderr


def test_divergence_is_one_line(launch, tiny, tmp_path):
    """Status 1: it is not the input that is wrong."""
    finished = launch("train_vqvae", *tiny, "train_vqvae.mse=1e38", cwd=tmp_path)
    assert finished.status == 1
    assert finished.stderr.count("\n") == 1
    assert "at step " in finished.stderr
