"""The sweep: its points, their join, what it leaves, and going on after an interruption."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.graph import run_stage
from dmoe_var.experiment.record import Record
from dmoe_var.sampling.store import StoredDrawing
from dmoe_var.stages import evaluate, sweep
from dmoe_var.stages.sweep import settings, table, table_of, whole

SHORT = {"sweep.last": [0.5], "sweep.all": [1.0], "sweep.lists": {"ours": [0.3, 0.6]}}
FEWEST = {"sweep.last": [], "sweep.all": []}
GROUPS = ["dense", "last", "all", "chosen"]


@pytest.fixture
def points_run(monkeypatch):
    """The points that were measured, in words."""
    seen, run = [], evaluate.run

    def counted(experiment, bench=None):
        seen.append(evaluate.describe(experiment))
        return run(experiment, bench)

    monkeypatch.setattr(evaluate, "run", counted)
    return seen


def test_settings(make_experiment):
    """The dense model first; grids on the last and on all scales; lists on the last."""
    experiment = make_experiment(changes={"sweep.all": [0.1], "sweep.lists.one": 0.2})
    found = []
    for curve, point in settings(experiment):
        config = point.experiment(experiment, 0).config
        told = (config.evaluate.model, config.selection.tau, config.moe.scales)
        found.append((curve.method, point.label, *told))
    assert found[0][:3] == ("dense", "dense", "dense")
    assert found[1:] == [
        ("last", "0", "dynamic", (0.0,), (2, 3)),
        ("last", "0.5", "dynamic", (0.5,), (2, 3)),
        ("all", "0.1", "dynamic", (0.1,), (0, 1, 2, 3)),
        ("chosen", "ours", "dynamic", (0.3, 0.6), (2, 3)),
        ("lists", "high", "dynamic", (1.0, 1.0), (2, 3)),
        ("lists", "one", "dynamic", (0.2,), (2, 3)),
    ]


def test_points(make_experiment):
    """Each is the evaluate stage of the same options, in a folder of its own."""
    experiment = make_experiment(changes={"sweep.all": [0.1, 0.5], "evaluate.format": "both"})
    works = [
        point.experiment(experiment, seed) for _, point in settings(experiment) for seed in (0, 1)
    ]
    assert len({each.folder("evaluate") for each in works}) == len(works) == 14
    assert {each.config.evaluate.format for each in works} == {"both"}
    for changes, setting in (
        ({"evaluate.model": "dense"}, 0),
        ({"selection.tau": 0.5}, 2),
        ({"selection.tau": 0.1, "moe.scales": [0, 1, 2, 3]}, 3),
        ({"selection.tau": [0.3, 0.6]}, 5),
    ):
        alone = make_experiment(changes={**changes, "evaluate.seed": 1, "evaluate.format": "both"})
        ours = settings(experiment)[setting][1].experiment(experiment, 1)
        assert ours.fingerprint("evaluate") == alone.fingerprint("evaluate")
        assert ours.folder("evaluate") == alone.folder("evaluate")


def test_points_take_nothing_of_a_selection(make_experiment):
    """Whatever else is asked for on the command line, their records are the same."""
    plain = make_experiment()
    asked = make_experiment(changes={"selection.rule": "top_k", "selection.k": 2})
    layers = make_experiment(changes={"selection.layer_tau": [[0.1], [0.2]]})
    for _, point in settings(plain):
        there = [
            point.experiment(whole(experiment), 1).folder("evaluate")
            for experiment in (plain, asked, layers)
        ]
        assert len(set(there)) == 1


@pytest.fixture(scope="module")
def swept(make_experiment, kept_runs):
    """A run folder in which the sweep is done."""
    run_stage(make_experiment(kept_runs, edited=SHORT), "sweep")
    return kept_runs


@pytest.fixture
def no_figures(monkeypatch):
    for figure in (sweep.fid_over_flops, sweep.sample_grid, sweep.expert_maps):
        monkeypatch.setattr(figure, "draw", lambda *args: None)
    monkeypatch.setattr(sweep, "collect_maps", lambda *args: None)


def test_sweep(make_experiment, swept, images_of):
    experiment = make_experiment(swept, edited=SHORT)
    record = Record.read(experiment.folder("sweep") / "result.json")
    rows = record.about["settings"]
    assert [row["group"] for row in rows] == GROUPS
    assert [(row["tau"], row["scales"]) for row in rows] == [
        ([], []), ([0.5], [2, 3]), ([1.0], [0, 1, 2, 3]), ([0.3, 0.6], [2, 3]),
    ]  # fmt: skip
    for row in rows:
        records = [Record.read(experiment.root / at / "result.json") for at in row["points"]]
        assert [r.config["evaluate.seed"] for r in records] == [0, 1]
        fid = [r.metrics["fid_fake"] for r in records]
        assert row["fid_by_seed"] == fid
        assert row["fid_mean"] == pytest.approx(sum(fid) / 2)
        assert row["fid_std"] == pytest.approx(abs(fid[0] - fid[1]) / 2**0.5)
        gmac = np.mean([r.metrics["flops_gmac"] for r in records])
        assert row["flops_gmac"] == pytest.approx(gmac)
        assert row["flops_saved"] == pytest.approx(1 - gmac / rows[0]["flops_gmac"])
        assert row["fid_change"] == pytest.approx(row["fid_mean"] / rows[0]["fid_mean"] - 1)
    saved = [row["flops_saved"] for row in rows]
    assert saved[0] == 0 < saved[1] < saved[2]
    assert {f"experts_share_scale{si}" for si in range(4)} <= rows[2].keys()
    assert record.metrics["operating_point_flops_saved"] == saved[3]
    assert record.metrics["dense_fid_mean"] == rows[0]["fid_mean"]
    for name, row in (("dense", rows[0]), ("operating_point", rows[3])):
        source, target = experiment.root / row["points"][0], experiment.root / name
        assert np.array_equal(*(images_of(f / "samples.npz") for f in (source, target)))
        assert Record.read(source / "result.json") == Record.read(target / "result.json")
    folder = experiment.folder("sweep")
    for figure in ("fid_over_flops", "samples", "expert_maps"):
        assert Image.open(folder / f"{figure}.png").format == "PNG"
    assert (folder / "table.md").read_text() == sweep.table_of(record) + "\n"


@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_sweep_goes_on(make_experiment, runs, points_run, monkeypatch):
    """The points that are there are not measured again."""
    experiment, draw = (
        make_experiment(runs, {**SHORT, **FEWEST, "sweep.seeds": [0]}),
        StoredDrawing.draw,
    )

    def draw_one(*args):
        if len(points_run) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(StoredDrawing, "draw", draw_one)
    with pytest.raises(KeyboardInterrupt):
        run_stage(experiment, "sweep")
    monkeypatch.setattr(StoredDrawing, "draw", draw)
    assert not (experiment.folder("sweep") / "result.json").exists()
    interrupted = points_run.pop()
    run_stage(experiment, "sweep")
    assert points_run[1] == interrupted
    assert len(points_run) == len(set(points_run)) == 2
    run_stage(experiment, "sweep")
    assert len(points_run) == 2


@pytest.mark.usefixtures("no_figures")
def test_a_wider_sweep_measures_what_is_new(make_experiment, swept, points_run, tmp_path):
    """It has a folder of its own and leaves the experiment's samples alone."""
    runs = shutil.copytree(swept, tmp_path / "runs")
    samples = make_experiment(runs).root / "dense" / "samples.npz"
    published = samples.read_bytes()
    wide = make_experiment(runs, {**FEWEST, "sweep.seeds": [2, 1]}, edited=SHORT)
    run_stage(wide, "sweep")
    assert len(points_run) == 2
    assert all(words.endswith("seed 2") for words in points_run)
    assert samples.read_bytes() == published
    assert (wide.folder("sweep") / "dense" / "samples.npz").read_bytes() != published


def test_table_of_the_committed_sweep():
    folder = Path(__file__).resolve().parents[2] / "notebooks" / "records" / "digits"
    record = Record.read(folder / "sweep_full.json")
    assert table_of(record) + "\n" == (folder / "table.md").read_text()


def test_table_of_what_was_measured():
    """No column for the classifier of digits with other data; published measures where there. A
    single seed has no spread."""
    plain = {
        "group": "dense", "label": "dense", "tau": [], "flops_gmac": 1.0, "flops_saved": 0.0,
        "fid_mean": 10.0, "fid_std": 0.0, "fid_change": 0.0, "inception_score_mean": 274.416,
        "precision": 0.8349, "recall": 0.561,
    }  # fmt: skip
    header, _, line = table([plain], "fid").splitlines()
    assert header == (
        "| setting | tau | GMAC | saved | FID | against dense | inception score | precision | "
        "recall |"
    )
    assert line == "| dense | - | 1.0000 | 0.0% | 10.000 | +0.00% | 274.42 | 83.5% | 56.1% |"


def test_points_are_not_png_alone(make_experiment, no_work):
    with pytest.raises(ConfigError, match=r"evaluate.format=png: .*allowed: npz, both"):
        run_stage(make_experiment(changes={"evaluate.format": "png"}), "sweep")


# Cut into parts


def cut(make_experiment, folder, part, parts):
    return make_experiment(folder, {"sweep.part": part, "sweep.parts": parts}, edited=SHORT)


def comparable(record):
    """A record without when and where, and without what its times say and chose (its maps are not
    drawn in every test)."""
    content = asdict(record)
    content["about"].pop("experts_ran_by", None)
    for told in (content["metrics"], *content["about"].get("settings", ())):
        told.pop("sampling_ms_per_image", None)
    del content["started"], content["ended"], content["config"]["run_dir"]
    return content


def point_records(experiment):
    paths = sorted((experiment.root / "evaluate").glob("*/result.json"))
    return {path.parent.name: comparable(Record.read(path)) for path in paths}


def test_parts_are_the_whole(make_experiment):
    whole = sweep.planned(make_experiment(edited=SHORT))
    parts = [sweep.planned(cut(make_experiment, ".", part, 3)) for part in (1, 2, 3)]
    assert [len(points) for points in parts] == [3, 3, 2]
    assert parts[0][0] == whole[0]
    joined = [each for points in parts for each in points]
    assert sorted(map(repr, joined)) == sorted(map(repr, whole))
    assert sweep.planned(cut(make_experiment, ".", 9, 9)) == []


@pytest.mark.usefixtures("no_figures")
def test_joined_parts_are_an_uncut_sweep(
    make_experiment, swept, trained, tmp_path, points_run, monkeypatch
):
    """In any order, one of them interrupted, two in one run folder and one in another that is
    copied into it: the records are those of one run, and the join measures nothing."""
    folders = [shutil.copytree(trained, tmp_path / f"runs{i}") for i in range(2)]
    draw = StoredDrawing.draw

    def interrupted(*args):
        if len(points_run) == 4:
            raise KeyboardInterrupt
        return draw(*args)

    for part in (3, 1, 2):
        experiment = cut(make_experiment, folders[part % 2], part, 3)
        monkeypatch.setattr(StoredDrawing, "draw", interrupted if part == 1 else draw)
        if part == 1:
            with pytest.raises(KeyboardInterrupt):
                sweep.run_part(experiment)
            monkeypatch.setattr(StoredDrawing, "draw", draw)
            points_run.pop()
        found = sweep.run_part(experiment)
        assert len(found) == len(sweep.planned(experiment))
        assert not (experiment.root / "sweep").exists()
        assert {"dense", "operating_point"}.isdisjoint(p.name for p in experiment.root.iterdir())
    assert len(points_run) == len(set(points_run)) == 2 * len(GROUPS)
    there, here = (folder / "tiny" / "evaluate" for folder in folders)
    shutil.copytree(there, here, dirs_exist_ok=True)
    ours, uncut = (make_experiment(folder, edited=SHORT) for folder in (folders[1], swept))
    record = run_stage(ours, "sweep")
    assert len(points_run) == 2 * len(GROUPS)
    assert point_records(ours) == point_records(uncut)
    expected = Record.read(uncut.folder("sweep") / "result.json")
    assert comparable(record) == comparable(expected)
    assert ours.folder("sweep").name == "default"


def test_a_part_names_no_other_sweep(make_experiment):
    """Nor does it go where the joined record is expected."""
    whole, part = make_experiment(edited=SHORT), cut(make_experiment, ".", 1, 2)
    assert part.fingerprint("sweep") == whole.fingerprint("sweep")
    assert sweep.whole(part) == whole
    with pytest.raises(ConfigError, match=r"sweep.part=1: .*by scripts/sweep.py; allowed here: nu"):
        run_stage(part, "sweep")


def test_wandb_gets_every_point(make_experiment, runs, monkeypatch):
    """As a run of the experiment's group, once."""
    given = []
    run = SimpleNamespace(log=lambda metrics: given[-1].update(metrics), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **options: given.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    experiment = make_experiment(runs, {"wandb": "offline", "sweep.part": 1, "sweep.parts": 5})
    records = sweep.run_part(experiment)
    sweep.run_part(experiment)
    assert [each["name"] for each in given] == [record.variant for record in records]
    assert {(each["group"], each["job_type"]) for each in given} == {("tiny", "evaluate")}
    assert [each["flops_gmac"] for each in given] == [r.metrics["flops_gmac"] for r in records]
    assert [each["config"]["evaluate.seed"] for each in given] == [r.seed for r in records]
