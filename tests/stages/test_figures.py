"""Figures from records: what is missing, making it, and that each shows what its records say."""

from __future__ import annotations

import importlib
import json
import threading
import time
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmoe_var.errors import ConfigError, DataError
from dmoe_var.experiment.graph import run_stage, run_through
from dmoe_var.experiment.points import operating_point, vary
from dmoe_var.figures import learning
from dmoe_var.files import alone
from dmoe_var.stages import figures
from dmoe_var.stages.catalogue import FIGURES
from dmoe_var.stages.catalogue.figure import at_size, note
from dmoe_var.stages.figures import make, missing, plan_text

ROOT = Path(__file__).resolve().parents[2]

FEW = {
    "figures.tau": [0.0, 0.5],
    "figures.seeds": [0, 1],
    "figures.pruned_shares": [0.25, 0.5],
    "figures.alphas": [0.0, 1e-3],
    "figures.router_alphas": [0.0, 1e-3],
    "figures.expert_sizes": [32, 64, 100, 128],
    "figures.single_scales": [1, 3],
    "figures.depths": {"2": None},
    "figures.time_tau": [0.0, 0.9],
    "figures.budgets": [0.8],
    "calibrate.densities": [0.7, 0.4],
    "calibrate.images": 20,
    "calibrate.held_out": 20,
    "calibrate.drawn": 60,
    "calibrate.refinements": 1,
    "figures.batch_size": 2,
    "benchmark.repeats": 1,
    "maps.images": 2,
}


@pytest.fixture
def experiment_of(make_experiment):
    """work_of(run_dir, names, **figures keys)."""

    def experiment_of(run_dir, *names, **keys):
        given = {f"figures.{key}": value for key, value in keys.items()}
        return make_experiment(run_dir, edited={**FEW, **given, "figures.figure": list(names)})

    return experiment_of


def shown(experiment, name):
    return json.loads((experiment.folder("figures") / f"figure_{name}.json").read_text())


def test_data_against_the_records(experiment_of, runs):
    """Every number of a figure, found again in result.json by other means."""
    experiment = experiment_of(runs, "3", make=True, tau=[0.5], pruned_shares=[0.25])
    run_stage(experiment, "figures")
    data = shown(experiment, "3")
    assert data["curves"][0]["name"] == "dense VAR"
    for curve in data["curves"]:
        for row in curve["rows"]:
            records = [
                json.loads((experiment.root / place / "result.json").read_text())
                for place in row["points"]
            ]
            fid = [record["metrics"]["fid_fake"] for record in records]
            assert [record["seed"] for record in records] == [0, 1]
            assert row["fid_by_seed"] == fid
            assert row["fid_mean"] == pytest.approx(fmean(fid))
            assert row["fid_std"] == pytest.approx(stdev(fid))
            gmac = fmean(record["metrics"]["flops_gmac"] for record in records)
            assert row["flops_gmac"] == pytest.approx(gmac)
    assert (experiment.folder("figures") / "figure_3.pdf").stat().st_size > 1000
    Image.open(experiment.folder("figures") / "figure_3.png").verify()
    assert not missing(experiment)


def test_points_of_the_calibration_are_those_of_its_record(experiment_of, runs):
    """Each way to choose tau is drawn at the tau that it chose."""
    experiment = experiment_of(runs, "calibration", make=True, seeds=[0])
    assert "calibration come after its tau are found" in plan_text(experiment, missing(experiment))
    run_stage(experiment, "figures")
    (calibration,) = FIGURES["calibration"](experiment).runs
    record, curves = calibration.record(experiment), FIGURES["calibration"](experiment).curves[1:]
    drawn = [curve["name"] for curve in shown(experiment, "calibration")["curves"][1:]]
    assert drawn == [curve.name for curve in curves]
    assert {curve.method for curve in curves} == set(record.about["curves"])
    for curve in curves:
        (row,), (point,) = record.about["curves"][curve.method], curve.points
        if curve.method == "by_layer":
            assert [list(of) for of in point.changes["selection.layer_tau"]] == row["tau"]
        else:
            assert list(point.changes["selection.tau"]) == row["tau"]


def test_training_curves_against_metrics_jsonl(experiment_of, runs):
    experiment = experiment_of(runs, "6", "10", make=True, seeds=[0], tau=[0.5])
    run_stage(experiment, "figures")
    six, ten = shown(experiment, "6"), shown(experiment, "10")
    assert [run["name"] for run in six["runs"]] == ["alpha 0", "alpha 0.001"]
    folder = vary(experiment, {"sparsify.alpha": 1e-3}).folder("sparsify")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if "ce" in line]
    assert logged
    for key in ("ce", "hoyer"):
        assert six["runs"][1][key] == [[line["step"], line[key]] for line in logged]
    low, high = (run["loss"] for run in ten["runs"])
    assert low != high


def test_pictures_and_times(experiment_of, runs, warm_processes):
    few = {"expert_sizes": [32], "time_tau": [0.5]}
    experiment = experiment_of(runs, "2a", "2b", "8b", "9", "12", make=True, **few)
    run_stage(experiment, "figures")
    for name in ("2a", "2b", "8b", "9", "12"):
        Image.open(experiment.folder("figures") / f"figure_{name}.png").verify()
    nine = shown(experiment, "9")["timings"]
    assert [timing["name"] for timing in nine] == ["experts of 32"]
    for timing in nine:
        record = json.loads((experiment.root / timing["record"] / "result.json").read_text())
        assert timing["rows"] == record["about"]["timings"]
        assert {row["model"] for row in timing["rows"]} >= {"dense", "dynamic"}


def test_missing_records_are_one_line(experiment_of, runs):
    experiment = experiment_of(runs, "4")
    with pytest.raises(DataError, match=r"4: 10 records are missing.*result\.json.*make=true"):
        run_stage(experiment, "figures")
    assert not (experiment.root / "evaluate").exists()


def test_plan(experiment_of, runs):
    """What is done is not planned; the order has each step after what it builds on."""
    experiment = experiment_of(runs, "5", "7")
    steps = missing(experiment)
    stages = [step.stage for step in steps]
    assert stages.count("train_var") == 1  # the other depth
    folders = [str(step.experiment.folder(step.stage)) for step in steps]
    assert len(set(folders)) == len(folders)
    for i, step in enumerate(steps):
        for upstream in step.experiment.needs(step.stage):
            above = str(step.experiment.folder(upstream))
            assert above in folders[:i] or (Path(above) / "result.json").exists()
    *lines, last = plan_text(experiment, steps).splitlines()
    assert [line.split() for line in lines] == [[str(i), f] for i, f in enumerate(folders, 1)]
    assert last == f"{len(steps)} steps"
    assert missing(experiment) == steps  # nothing was made


def test_commands_share_the_work(experiment_of, runs, monkeypatch):
    """A command that draws into the folder of figures keeps no other one from making records."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("figures")
    experiment = experiment_of(runs, "4", seeds=[0], make=True)
    folder = experiment.folder("figures")
    folder.mkdir(parents=True, exist_ok=True)
    drawing, left = threading.Event(), []

    def draw():
        with alone(folder):
            drawing.set()
            give_up = time.monotonic() + 60
            while missing(experiment) and time.monotonic() < give_up:
                time.sleep(0.1)
            left.extend(missing(experiment))

    other = threading.Thread(target=draw)
    other.start()
    drawing.wait()
    script.run(experiment)
    other.join()
    assert not left
    assert (folder / "figure_4.png").exists()


def test_make_goes_on_where_it_stopped(experiment_of, runs, monkeypatch):
    """Claims are those of all figures in the folder."""
    experiment, made = experiment_of(runs, "4", seeds=[0]), []

    def stop_after(limit):
        def stopping(*args, **kwargs):
            if len(made) == limit:
                raise KeyboardInterrupt
            made.append(args[1])
            return run_stage(*args, **kwargs)

        return stopping

    monkeypatch.setattr(figures, "run_stage", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        make(experiment)
    assert len(missing(experiment)) == 3
    monkeypatch.setattr(figures, "run_stage", stop_after(99))
    make(experiment)
    assert len(made) == 5
    assert not missing(experiment)
    for name in ("4", "8a"):
        run_stage(experiment_of(runs, name, seeds=[0], make=True), "figures")
    judged = (experiment.folder("figures") / "claims.md").read_text()
    assert "| 4 | scale 4 alone | scale 2 alone |" in judged
    assert "| 8a | experts of 32 | experts of 64 |" in judged


def test_quick_figures_say_so(experiment_of, tmp_path):
    experiment = at_size(
        experiment_of(tmp_path, "4", quick=True, quick_samples=10, tau=[0.0, 0.1, 0.2, 0.3, 0.4])
    )
    assert note(experiment).startswith("QUICK")
    assert "10 images a point, 1 seed" in note(experiment)
    figure = FIGURES["4"](experiment)
    assert [len(curve.points) for curve in figure.curves] == [1, 4, 4]
    assert {need.experiment.config.evaluate.num_samples for need in figure.needs(experiment)} == {
        10
    }
    assert len(figure.needs(experiment)) == 9


def test_the_operating_point(make_experiment):
    """The sweep's chosen list, unless a selection was asked for; then that one, whole."""
    lists = {"sweep.lists": {"ours": [0.3, 0.6]}, "sweep.chosen": "ours"}
    assert operating_point(make_experiment(edited=lists)) == {
        "selection.rule": "threshold",
        "selection.tau": (0.3, 0.6),
    }
    asked = {"selection.layer_tau": [[0.1], [0.2]]}
    assert operating_point(make_experiment(changes=asked, edited=lists)) == {}
    assert operating_point(make_experiment(edited={"sweep.chosen": None})) == {}


@pytest.mark.parametrize("name", ["3", "5"])
def test_a_tau_for_each_layer_is_of_its_own_depth(experiment_of, make_experiment, name):
    """Curves of another depth do without it."""
    experiment = make_experiment(changes={"selection.layer_tau": [[0.1], [0.2]]}, edited=FEW)
    needed = [need.experiment.config for need in FIGURES[name](experiment).needs(experiment)]
    assert {config.var.depth for config in needed} == {1, 2}
    assert all(config.var.depth == 1 for config in needed if config.selection.layer_tau)


def test_base_training_from_its_snapshots(make_experiment, runs, images_of, monkeypatch):
    """A point per model that training left; losses are those that it logged. The pictures are the
    points' first of each class. Without snapshots one line says so."""
    keys = {**FEW, "figures.figure": ["learning"], "figures.seeds": [0], "figures.make": True}
    experiment = make_experiment(runs, edited=keys)
    with pytest.raises(ConfigError, match="snapshot_every=None: figure=learning needs"):
        run_stage(experiment, "figures")
    training = make_experiment(
        runs,
        edited={**keys, "seed": 1, "train_var.snapshot_every": 1, "train_var.validate_every": 1},
    )
    run_through(training, "train_var", lambda stage, done: None)
    strips, draw = [], learning.draw

    def see(data, strip, *rest):
        strips.append(strip)
        draw(data, strip, *rest)

    monkeypatch.setattr(learning, "draw", see)
    run_stage(training, "figures")
    data = shown(training, "learning")
    lines = (training.folder("train_var") / "metrics.jsonl").read_text().splitlines()
    ce = [each["val_ce_scale3"] for each in map(json.loads, lines) if "val_ce" in each]
    assert data["validated"]["steps"] == [1, 2]
    assert data["validated"]["ce"][3] == ce
    rows = data["curves"][0]["rows"]
    assert [row["value"] for row in rows] == [1, 2]
    weights = load_file(training.folder("train_var") / "checkpoint" / "model.safetensors")
    last = load_file(training.folder("train_var") / "snapshots" / "000002" / "model.safetensors")
    assert all(torch.equal(weights[name], last[name]) for name in weights)
    for row, (name, pictures) in zip(rows, strips[0].items(), strict=True):
        samples = images_of(training.root / row["points"][0] / "samples.npz")
        assert name == f"step {row['value']}"
        assert (pictures == samples[:10]).all()
