"""moe.skipped=mean in every stage: whose means stand, and that they are measured once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmoe_var import DynamicVAR, Threshold, generate
from dmoe_var.calibration.skipped_means import measure_skipped_means
from dmoe_var.data.images import to_uint8
from dmoe_var.errors import CheckpointError, ConfigError
from dmoe_var.experiment.graph import run_stage
from dmoe_var.stages.parts import loaded, skipped_means, timed_cases

MEAN = {"moe.skipped": "mean", "moe.mean_images": 12, "selection.tau": 0.5}


@pytest.fixture
def measured(monkeypatch):
    """The selections that means are measured of, in order."""
    asked = []

    def measure(model, batches, selection, *rest):
        asked.append([rule.tau for rule in selection])
        return measure_skipped_means(model, batches, selection, *rest)

    monkeypatch.setattr(skipped_means, "measure_skipped_means", measure)
    return asked


def with_means(experiment, selection):
    """The model and what evenly spread training images say of a selection."""
    model, vqvae = loaded.dynamic(experiment), loaded.vqvae(experiment)
    tokens, _ = loaded.token_sets(experiment, vqvae)
    indices = torch.tensor([i * 40 // 12 for i in range(12)])
    _, labels, teacher = tokens.teacher_forced(indices, vqvae)
    model.set_skipped(measure_skipped_means(model, [(labels, teacher)], selection))
    return model, vqvae


def test_a_point(make_experiment, runs, images_of, measured):
    """Its images, its record and its cost; the next seed and the next run measure nothing."""
    experiment = make_experiment(runs, MEAN)
    record = run_stage(experiment, "evaluate")
    plain = run_stage(make_experiment(runs, {"selection.tau": 0.5}), "evaluate")
    assert record.variant != plain.variant
    assert (record.about["means_of"], "means_of" in plain.about) == ("threshold 0.5", False)
    model, vqvae = with_means(experiment, Threshold(0.5))
    image = generate(model, vqvae, [3], seed=0, start_index=3, tau=0.5)
    drawn = images_of(experiment.folder("evaluate") / "samples.npz")
    assert np.abs(image[0].permute(1, 2, 0).numpy() * 255 - drawn[3]).max() < 0.51
    share = [record.metrics[f"experts_share_scale{si}"] for si in (2, 3)]
    pairs, all_pairs = (2 * 4 * (9 * one + 16 * two) for one, two in (share, (1, 1)))
    macs = pairs * 2 * 32 * 32 + all_pairs * 32
    assert record.metrics["flops_experts_gmac"] == pytest.approx(macs / 1e9)
    run_stage(make_experiment(runs, {**MEAN, "evaluate.seed": 1}), "evaluate")
    assert measured == [[0.5, 0.5]]
    run_stage(make_experiment(runs, {**MEAN, "sampling.cfg": 0}), "evaluate")
    run_stage(make_experiment(runs, {**MEAN, "moe.mean_images": 13}), "evaluate")
    assert measured == [[0.5, 0.5]] * 3  # the rows that run, or the images, are others


def test_a_cache_that_is_cut_short_is_made_again(make_experiment, runs, measured):
    experiment = make_experiment(runs, MEAN)
    record = run_stage(experiment, "evaluate")
    (path,) = (experiment.cache / "skipped").glob("*/model.safetensors")
    path.write_bytes(path.read_bytes()[:-2])
    stored = experiment.folder("evaluate") / "samples.npz"
    stored.write_bytes(stored.read_bytes()[:-2])  # so that the stage is not done
    (experiment.folder("evaluate") / "drawn.npz").unlink(missing_ok=True)
    again = run_stage(experiment, "evaluate")
    assert again.metrics["flops_gmac"] == record.metrics["flops_gmac"]
    assert measured == [[0.5, 0.5]] * 2


def test_every_stage(make_experiment, runs, measured):
    """Each selection of a sweep, of maps and of the page is measured once for all of them."""
    changes = {**MEAN, "sweep.lists": {"ours": [0.3, 0.6]}, "sweep.seeds": [0]}
    swept = make_experiment(runs, {**changes, "sweep.all": [0.5]})
    assert "skipped=mean" in run_stage(swept, "sweep").variant
    sweep = [[0.0, 0.0], [0.5, 0.5], [0.5] * 4, [0.3, 0.6], [0.6, 1.0]]
    assert measured == sweep
    shown = {"maps.tau": [0.0, 0.4], "maps.images": 2, "report.tau": [0.4, 0.6]}
    experiment = make_experiment(runs, {**changes, **shown, "report.labels": [0]})
    run_stage(experiment, "maps")
    assert measured == [*sweep, [0.4, 0.4]]
    run_stage(experiment, "report")
    assert measured == [*sweep, [0.4, 0.4], [0.6, 0.6]]


def test_what_is_sampled_and_exported(make_experiment, runs, images_of, measured):
    sampled = {**MEAN, "sample.classes": [3], "sample.model": "dynamic"}
    experiment = make_experiment(runs, sampled)
    model, vqvae = with_means(experiment, Threshold(0.5))
    expected = to_uint8(generate(model, vqvae, [3], seed=0, tau=0.5))
    record = run_stage(experiment, "sample")
    path = experiment.folder("sample") / "dynamic" / "samples.npz"
    assert np.abs(images_of(path).astype(int) - expected).max() <= 1
    assert record.about["means_of"] == "tau 0.5, 0.5"
    run_stage(experiment, "export")
    assert len(measured) == 1
    folder = experiment.folder("export") / "dynamic_var"
    stored = DynamicVAR.from_pretrained(folder)
    for si in (2, 3):
        torch.testing.assert_close(stored.skipped.at(si), model.skipped.at(si))
    # Sample from it: its own rule and means, or a given rule with them, or none
    given = {"sample.pretrained": str(folder), "sample.classes": [3], "sample.model": "dynamic"}
    for more, means, tau in (
        ({}, True, 0.5),
        ({"sample.selection": "given", "moe.skipped": "mean", "selection.tau": 0.7}, True, 0.7),
        ({"sample.selection": "given", "selection.tau": 0.7}, False, 0.7),
    ):
        experiment = make_experiment(runs, {**given, **more})
        record = run_stage(experiment, "sample")
        assert ("means_of" in record.about) == means
        stored.set_skipped(model.skipped if means else None)
        expected = to_uint8(generate(stored, vqvae, [3], seed=0, tau=tau))
        path = experiment.folder("sample") / "dynamic" / "samples.npz"
        assert np.abs(images_of(path).astype(int) - expected).max() <= 1
    stored.set_skipped(None)
    stored.save_pretrained(runs / "without")
    without = {**given, **MEAN, "sample.pretrained": str(runs / "without")}
    experiment = make_experiment(runs, without)
    with pytest.raises(CheckpointError, match=r"moe.skipped=mean.*allowed: zero"):
        run_stage(experiment, "sample")


def test_a_benchmark_times_it(make_experiment, runs, measured):
    experiment = make_experiment(runs, {**MEAN, "benchmark.tau": [0.5]}).read_by("benchmark")
    cases = timed_cases.cases_of(experiment, timed_cases.sources_of(experiment), 2)
    assert [case.task.skipped is None for case in cases] == [True, False]
    model, _ = cases[1].task.load()
    assert torch.equal(model.skipped.at(3), cases[1].task.skipped.at(3))
    assert cases[1].flops.skipped_macs == {2: 2 * 9 * 4 * 32, 3: 2 * 16 * 4 * 32}


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("calibrate", {}, "moe.skipped=mean: tau is calibrated without means"),
        ("benchmark", {"benchmark.kernels": True}, "moe.skipped=mean: benchmark.kernels=true"),
    ],
)
def test_refused(make_experiment, stage, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_experiment(changes={**MEAN, **changes}).check(stage)
