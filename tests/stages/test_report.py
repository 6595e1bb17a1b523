"""The report stage: what of the records gets onto the page, and what is said of the others."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.graph import run_stage
from dmoe_var.experiment.record import Record
from dmoe_var.files import write_text
from dmoe_var.metrics.flops import SAMPLER_PARTS
from dmoe_var.report.records import Curves, setting_of, stages
from dmoe_var.stages import report

SMALL = {"report.tau": [0.0, 0.5], "report.labels": [7, 1], "report.grid_images": 12}
SWEEP = {"sweep.last": [0.5], "sweep.lists": {"ours": [0.3, 0.6]}}


def data_of(experiment):
    """What the page's scripts read."""
    text = (experiment.folder("report") / report.REPORT_FILE).read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def rows_of(data):
    return [row for curve in data["quality"]["curves"] for row in curve["rows"]]


@pytest.fixture(scope="module")
def swept(make_experiment, kept_runs):
    """A run folder with a short sweep and its report; not to be written to."""
    experiment = make_experiment(kept_runs, {**SMALL, **SWEEP})
    run_stage(experiment, "sweep")
    return experiment, run_stage(experiment, "report")


def test_the_sweep_becomes_the_curve(swept):
    experiment, record = swept
    shown = rows_of(data_of(experiment))
    sweep = json.loads((experiment.folder("sweep") / "result.json").read_text())["about"][
        "settings"
    ]
    assert [row["gmac"] for row in shown] == [row["flops_gmac"] for row in sweep]
    assert [row["fid"] for row in shown] == [row["fid_mean"] for row in sweep]
    assert [row["fid_std"] for row in shown] == [row["fid_std"] for row in sweep]
    assert [row["tau"] for row in shown] == ["", "0.5", "0.3, 0.6"]
    assert [row["dense"] for row in shown] == [True] + [False] * (len(sweep) - 1)
    assert [row["chosen"] for row in shown] == [row["group"] == "chosen" for row in sweep]
    assert record.metrics["points"] == len(sweep)


def test_grids_hold_the_first_pictures(swept, images_of):
    experiment, _ = swept
    for row in rows_of(data_of(experiment)):
        content = base64.b64decode(row["grid"].partition("base64,")[2])
        grid = np.asarray(Image.open(io.BytesIO(content)))
        images = images_of(experiment.root / row["at"][0] / "samples.npz")
        assert grid.shape == (17, 89, 3)  # 10 + 2 pictures of 8 pixels, a pixel between them
        assert (grid[:8, 9:17] == images[1]).all()
        assert (grid[9:, :8] == images[10]).all()


def test_the_microscope_holds_the_asked_classes(swept):
    experiment, record = swept
    stored = data_of(experiment)["microscope"]
    assert [picture["label"] for picture in stored["pictures"]] == [7, 1]
    assert [picture["name"] for picture in stored["pictures"]] == ["7", "1"]
    assert stored["chosen"] == [0.3, 0.6]
    for picture in stored["pictures"]:
        assert [drawn["tau"] for drawn in picture["drawn"]] == [0.0, 0.5]
        every, some = picture["drawn"]
        assert every["shares"] == [1, 1]
        assert some["gmac"] < every["gmac"]
    assert record.num_samples == 2


def test_what_is_missing_is_told_and_what_is_too_large_left_out(make_experiment, runs, capsys):
    """A broken record counts as missing. There is room for one picture of two, and then not even
    for the rest."""
    broken = runs / "tiny" / "evaluate" / "odd" / "result.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    experiment = make_experiment(runs, SMALL)
    record = run_stage(experiment, "report")
    assert f"{broken}: cut short or no JSON file" in capsys.readouterr().err
    found = data_of(experiment)
    assert rows_of(found) == []
    assert record.about["missing"] == ["sweep", "evaluate", "calibrate", "benchmark"]
    assert {stage["state"] for stage in found["stages"]} == {"present", "missing"}
    assert len(found["microscope"]["pictures"]) == 2
    first = len(json.dumps(found["microscope"].pop("pictures")[0]))
    room = len(json.dumps(found)) + 1.5 * first
    tight = make_experiment(runs, {**SMALL, "report.max_mb": room / 1e6})
    run_stage(tight, "report")
    assert data_of(tight)["microscope"]["left_out"] == 1
    with pytest.raises(ConfigError, match=r"^report\.max_mb=0\.001: the page takes .* MB"):
        run_stage(make_experiment(runs, {**SMALL, "report.max_mb": 0.001}), "report")


def test_single_evaluations_are_shown_too(make_experiment, runs):
    """Several seeds of a setting are one point, in which a seed counts once, whatever its batch
    size; another number of images, and another way to sample, are no points beside it."""
    alone = {"selection.rule": "top_k", "selection.k": 2}
    points = [{"evaluate.seed": 0}, {"evaluate.seed": 1}, {"evaluate.num_samples": 30}]
    points.append({"evaluate.seed": 2, "sampling.heads.ratios": [0, 0, 0, 0.5]})
    for changes in (*points, {"evaluate.seed": 1, "sampling.batch_size": 7}):
        run_stage(make_experiment(runs, {**alone, **changes}), "evaluate")
    (curve,) = Curves(make_experiment(runs)).shown()["curves"]
    (row,) = curve["rows"]
    assert (row["label"], row["seeds"], len(row["at"])) == ("2", 2, 2)


def test_a_point_is_the_mean_over_its_seeds(make_experiment, tmp_path):
    """Of records by hand; the spread is the sample's standard deviation."""
    numbers = {
        0: {"fid_fake": 3.0, "flops_gmac": 10.0, "flops_gmac_std": 1.0, "label_agreement": 0.5},
        1: {"fid_fake": 5.0, "flops_gmac": 14.0, "flops_gmac_std": 2.0, "label_agreement": 1.0},
    }
    about = {"about": {"fidelity": "fid_fake"}, "num_samples": 20, "dtype": "float32"}
    about |= {"started": "a", "ended": "b", "device": "cpu", "threads": 1, "git_commit": ""}
    for seed, metrics in numbers.items():
        parts = {f"flops_{part}_gmac": seed + i for i, part in enumerate(SAMPLER_PARTS)}
        scales = {"flops_scale0_gmac": 2.0 * seed, "flops_scale1_gmac": 8.0}
        each = make_experiment(tmp_path, {"selection.tau": [0.25], "evaluate.seed": seed})
        metrics = {**metrics, **parts, **scales, "experts_share_scale1": 0.5 + seed / 4}
        folder, config = each.folder("evaluate"), each.config.leaves
        folder.mkdir(parents=True)
        names = ("evaluate", each.variant("evaluate"), each.fingerprint("evaluate"))
        Record(*names, metrics, config, seed=seed, libraries={}, **about).write(folder)
    (curve,) = Curves(make_experiment(tmp_path)).shown()["curves"]
    (row,) = curve["rows"]
    expected = {
        "label": "0.25", "fid": 4, "gmac": 12, "gmac_std": 1.5, "agreement": 0.75, "seeds": 2,
        "parts": [i + 0.5 for i in range(len(SAMPLER_PARTS))],
        "scales": [{"gmac": 1, "share": None}, {"gmac": 8, "share": 0.625}],
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert row["fid_std"] == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("changes", "method", "curve", "label"),
    [
        ({"evaluate.model": "dense"}, "dense", "dense VAR", "dense"),
        (
            {"evaluate.model": "pruned", "pruning.share": 0.3},
            "pruned", "Pruned-FFN (dense, mean_abs), scales 3, 4", "share 0.3",
        ),
        ({"selection.tau": [0.5]}, "last", "Eq. 3, evaluated alone, scales 3, 4", "0.5"),
        ({"selection.tau": [0.5, 1]}, "lists", "Eq. 3, evaluated alone, scales 3, 4", "0.5, 1"),
        (
            {"selection.layer_tau": [[0.5], [0.25]]},
            "lists", "a tau a layer, scales 3, 4", "0.5; 0.25",
        ),
        (
            {"selection.rule": "oracle", "selection.tau": [0.5], "moe.scales": [1]},
            "oracle", "Eq. 3 on true norms (oracle), scales 2", "0.5",
        ),
        ({"selection.rule": "top_k", "selection.k": 3}, "top_k", "top-k, scales 3, 4", "3"),
        ({"selection.rule": "all"}, "all", "all experts, scales 3, 4", "all"),
        (
            {"selection.rule": "keys", "selection.tau": [0.5, 1]},
            "keys", "Eq. 3 on keys (no router), scales 3, 4", "0.5, 1",
        ),
    ],
)  # fmt: skip
def test_the_curve_of_a_setting(changes, method, curve, label):
    """From the keys of a record's configuration."""
    config = {
        "evaluate.model": "dynamic", "moe.scales": [2, 3], "selection.rule": "threshold",
        "selection.layer_tau": [], "pruning.model": "dense", "pruning.rule": "mean_abs",
    }  # fmt: skip
    assert setting_of({**config, **changes}) == (method, curve, label)


def test_records_of_another_model_stay_out(make_experiment, runs):
    run_stage(make_experiment(runs), "evaluate")
    path = make_experiment(runs).folder("evaluate") / "result.json"
    content = json.loads(path.read_text())
    content["config"]["sparsify.alpha"] = 7.0
    write_text(path, json.dumps(content))
    experiment = make_experiment(runs)
    assert Curves(experiment).shown()["curves"] == []
    (stage,) = [stage for stage in stages(experiment) if stage["name"] == "evaluate"]
    assert stage["state"] == "made otherwise"
    assert "sparsify.alpha" in stage["note"]
    assert "7.0" in stage["note"]


def test_the_page_is_whole_or_not_there(make_experiment, runs, full_disk):
    experiment = make_experiment(runs, SMALL)
    with full_disk(20_000), pytest.raises(OSError, match=re.escape(report.REPORT_FILE)):
        run_stage(experiment, "report")
    assert [path.name for path in experiment.folder("report").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report.labels": [3, 10]}, r"report\.labels=\[3, 10\] must be within 0\.\.9"),
        ({"report.tau": [0.2, 0.1]}, r"tau=\[0\.2, 0\.1\] must be distinct and rising"),
    ],
)
def test_wrong_values(make_experiment, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_experiment(changes=changes)
