"""The stage: a budget hit on held-out images, what is out of reach, and by layer."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dmoe_var import load_var
from dmoe_var.calibration.costs import CostTable
from dmoe_var.calibration.losses import CrossEntropy, TeacherForced
from dmoe_var.calibration.refinement import at_cost, most_losses
from dmoe_var.calibration.temperature import temperatures
from dmoe_var.errors import ConfigError, InputError
from dmoe_var.experiment.graph import run_stage
from dmoe_var.files import write_text
from dmoe_var.metrics.flops import count_flops
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.selection import LayerThreshold, Oracle, Threshold
from dmoe_var.stages import calibrate
from dmoe_var.stages.parts import calibration_bench, loaded
from dmoe_var.stages.parts.calibration_bench import Calibration, CalibrationBench
from dmoe_var.stages.parts.loaded import token_sets

FEW = {
    "calibrate.budget": 0.85,
    "calibrate.densities": [0.7, 0.4],
    "calibrate.images": 20,
    "calibrate.held_out": 20,
    "calibrate.drawn": 60,
    "calibrate.batch_size": 8,
    "calibrate.time_batch": 2,
    "calibrate.time_repeats": 1,
}


def made(make_experiment, runs, **changes):
    given = {f"calibrate.{key}": value for key, value in changes.items()}
    return make_experiment(runs, changes={**FEW, **given})


@pytest.fixture(scope="module")
def calibrated(make_experiment, kept_runs):
    """A calibration and its record."""
    experiment = made(make_experiment, kept_runs)
    return experiment, run_stage(experiment, "calibrate")


def densities(experiment, rules):
    """Share of the experts that run at each scale under teacher forcing on held-out images, with
    their classes and without."""
    bench, counts = CalibrationBench(experiment), ExpertCounts()
    for labels_B, teacher_BLC, _ in bench.images[1].batches():
        for labels in (labels_B, torch.full_like(labels_B, 10)):
            bench.model(labels, teacher_BLC, selection=rules, observer=counts)
    ran = counts._by_scale.values()
    return [
        torch.cat([x.flatten() for x in of]).float().mean().item() / counts.num_experts
        for of in ran
    ]


def test_a_budget_is_hit_on_held_out_images(calibrated):
    """Counted once more by `count_flops`, of other images, under the tau that was found."""
    experiment, record = calibrated
    model, vqvae = loaded.dynamic(experiment), loaded.vqvae(experiment)
    labels = [i % 10 for i in range(200)]
    tau = record.about["tau"]
    counted = count_flops(model, vqvae, labels, tau=tau, seed=77).total_gmac
    dense = count_flops(model.dense, vqvae, labels[:1]).total_gmac
    assert record.metrics["dense_gmac"] == pytest.approx(dense)
    assert counted / dense == pytest.approx(0.85, rel=0.015)
    assert record.metrics["predicted_over_measured"] == pytest.approx(1, abs=0.015)
    assert record.metrics["predicted_gmac"] == pytest.approx(0.85 * dense, rel=1e-3)
    assert 2 * 3 + 1 + 2 + 3 < record.metrics["loss_evaluations"] <= 2 * 3 + 1 + most_losses(2, 3)
    assert len(tau) == 2
    loss = CalibrationBench(experiment).held_out_loss
    teacher = loss.images.batches()
    found = [
        F.cross_entropy(model.dense(y, x)[:, own].flatten(0, 1), t[:, own].flatten()).item()
        for y, x, t in teacher
        for own in model.config.scale_slices[2:]
    ]
    assert record.metrics["held_out_ce_dense"] == pytest.approx(sum(found) / len(found), rel=0.02)


def test_what_finds_tau_does_not_judge_it(make_experiment, runs, monkeypatch):
    """Losses that decide are of training images, and images that correct of one seed; what is
    told in the end is of held-out images, and of images drawn from another seed."""
    experiment = made(make_experiment, runs, densities=[0.5], refinements=1, drawn=10)
    training, held_out = (
        tokens.batch(torch.arange(40))[0]
        for tokens in token_sets(experiment, loaded.vqvae(experiment))
    )
    measured, seeds = {"training": [], "held out": []}, []

    def level(tau):
        return 3 * tau[0] + tau[1] ** 2

    def measure(loss, rules):
        tokens, _ = loss.images.tokens.batch(torch.arange(40))
        assert torch.equal(tokens, training) != torch.equal(tokens, held_out)
        of, above = ("training", 1) if torch.equal(tokens, training) else ("held out", 100)
        tau = [rule.tau for rule in rules]
        measured[of].append(tau)
        return above + level(tau)

    drawing = calibration_bench.Drawing
    monkeypatch.setattr(
        calibration_bench, "Drawing", lambda *args: seeds.append(args[3]) or drawing(*args)
    )
    monkeypatch.setattr(CrossEntropy, "_measure", measure)
    record = run_stage(experiment, "calibrate")
    tau, seed = record.about["tau"], experiment.config.calibrate.seed
    assert [0.0, 0.0] in measured["training"]
    assert len(measured["training"]) > 2 * 2 + 1
    for each in record.about["losses"]:
        alone = [[t, 0.0] if each["group"] == [2] else [0.0, t] for t in each["tau"]]
        assert each["loss"] == pytest.approx([level(taus) for taus in alone])
    *held_out, oracle = measured["held out"]
    assert held_out == [tau, [0.0, 0.0]]
    ran = [
        densities(experiment, [rule(t) for t in of])
        for rule, of in ((Threshold, tau), (Oracle, oracle))
    ]
    assert ran[0] == pytest.approx(ran[1], abs=0.02)
    assert min(ran[0]) < 0.9
    assert record.metrics["held_out_ce"] == pytest.approx(100 + level(tau))
    assert record.metrics["held_out_ce_all_experts"] == 100
    assert record.metrics["held_out_ce_oracle"] == pytest.approx(100 + level(oracle))
    assert seeds == [seed, seed, seed, seed + 1]
    counted = count_flops(
        loaded.dynamic(experiment),
        loaded.vqvae(experiment),
        list(range(10)),
        tau=tau,
        seed=seed + 1,
    )
    assert record.metrics["measured_gmac"] == pytest.approx(counted.total_gmac, rel=1e-9)
    assert record.metrics["measured_gmac_std"] == pytest.approx(counted.total_gmac_std, rel=1e-6)
    metrics = record.metrics
    ratio = metrics["predicted_gmac"] / counted.total_gmac
    assert metrics["predicted_over_measured"] == pytest.approx(ratio)
    assert metrics["measured_share"] == pytest.approx(counted.total_gmac / metrics["dense_gmac"])
    assert (record.seed, record.num_samples, record.dtype) == (seed, 10, "float32")


def test_a_bench_has_trained_routers_and_its_own_losses(make_experiment, runs):
    """Losses of another configuration in the same folder are not taken for its own."""
    bench = CalibrationBench(made(make_experiment, runs))
    found = bench.model.moe.state_dict()
    for stage, alike in (("train_router", True), ("split", False)):
        stored = load_var(bench.experiment.folder(stage) / "checkpoint").state_dict()
        assert all(torch.equal(found[key], stored[key]) for key in stored) == alike
    assert (bench.training_loss.by_tokens, bench.held_out_loss.by_tokens) == (False, False)
    experiment = make_experiment(runs, edited={"calibrate.images": 20})
    kept = experiment.folder("calibrate") / "losses.jsonl"
    lines = [
        {"key": name, "ce": 1.0, "fingerprint": of.fingerprint("calibrate")}
        for name, of in (("ours", experiment), ("theirs", make_experiment(runs)))
    ]
    kept.parent.mkdir(parents=True)
    write_text(kept, "".join(json.dumps(line) + "\n" for line in lines))
    assert CalibrationBench(experiment).training_loss.known == {"ours": 1.0}
    assert CalibrationBench(experiment).held_out_loss.known == {}
    by_tokens = CalibrationBench(made(make_experiment, runs, loss="ce_tokens"))
    assert (by_tokens.training_loss.by_tokens, by_tokens.held_out_loss.by_tokens) == (True, True)


def test_scores_are_of_training_images_and_costs_of_the_configured_guidance(
    make_experiment, runs, monkeypatch
):
    bench = CalibrationBench(made(make_experiment, runs, images=10))
    monkeypatch.setattr(calibration_bench, "record_scores", lambda model, batches: batches)
    training, _ = token_sets(bench.experiment, bench.vqvae)
    tokens_BL, labels_B = training.batch(torch.arange(10) * 4)
    labels, teachers = zip(*bench.cells, strict=True)
    assert torch.equal(torch.cat(labels), labels_B)
    expected = bench.vqvae.teacher_input(training.by_scale(tokens_BL))
    torch.testing.assert_close(torch.cat(teachers), expected)
    unguided = CalibrationBench(make_experiment(runs, {"sampling.cfg": 0}))
    assert {*bench.fixed.branches, *unguided.fixed.branches} == {1, 2}
    for each, cfg in ((bench, 1.5), (unguided, 0)):
        counted = count_flops(each.model.dense, each.vqvae, [0], cfg=cfg)
        assert each.dense_gmac == pytest.approx(counted.total_gmac, rel=1e-9)


def test_refined_on_training_images(make_experiment, calibrated, runs):
    """As many FLOPs, and no more loss than the losses of each scale alone, or one tau, come to."""
    experiment, refined = calibrated
    alone = run_stage(made(make_experiment, runs, refinements=0), "calibrate")
    assert refined.about["tau"] != alone.about["tau"]
    assert alone.metrics["loss_evaluations"] == 2 * 3 + 1
    calibration = Calibration(CalibrationBench(experiment), by_layer=False)
    loss, dense = calibration.bench.training_loss, alone.metrics["dense_gmac"]
    plan = calibration.plan_under([Threshold(tau) for tau in refined.about["tau"]])
    one_tau = at_cost({(2,): 0.5, (3,): 0.5}, plan.gmac, 0.85 * dense)
    found = loss([Threshold(tau) for tau in refined.about["tau"]])
    for other in (alone.about["tau"], list(one_tau.values())):
        assert found <= loss([Threshold(tau) for tau in other]) + 1e-4
    for record in (refined, alone):
        assert record.metrics["predicted_gmac"] == pytest.approx(0.85 * dense, rel=1e-3)


def test_the_same_twice(calibrated, monkeypatch):
    """Losses that were measured are kept: an interrupted calibration does not measure them anew."""
    experiment, first = calibrated
    monkeypatch.setattr(CrossEntropy, "_measure", lambda self, rules: 1.0)
    assert calibrate.run(experiment).about["tau"] == first.about["tau"]


def test_rivals(make_experiment, runs):
    experiment = made(make_experiment, runs, budgets=[0.8, 0.95])
    record = run_stage(experiment, "calibrate")
    curves = record.about["curves"]
    assert {"calibrated", "by_layer", "fixed", "linear"} <= set(curves)
    assert set(curves) <= {"calibrated", "by_layer", "fixed", "linear", "search"}
    assert [len(of_scale) for of_scale in curves["by_layer"][0]["tau"]] == [1, 1]  # one layer
    dense = record.metrics["dense_gmac"]
    for name, rows in curves.items():
        assert [row["budget"] for row in rows] == [0.8, 0.95] or name == "search"
        for row in rows:
            above = 1.011 if name in ("search", "linear") else 1.001
            assert row["gmac"] <= above * row["budget"] * dense
    assert len(set(curves["fixed"][0]["tau"])) == 1
    held_out_loss = CalibrationBench(experiment).held_out_loss
    for method, (row, *_) in curves.items():
        rule = (lambda tau: LayerThreshold(tuple(tau))) if method == "by_layer" else Threshold
        expected = held_out_loss([rule(tau) for tau in row["tau"]])
        assert row["ce"] == pytest.approx(expected, rel=1e-5), method
    Image.open(experiment.folder("calibrate") / "calibration.png").verify()


def test_rivals_without_optuna(make_experiment, runs, monkeypatch):
    """One line before any work; what compares nothing needs no search."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name)
    )
    experiment = made(make_experiment, runs, budgets=[0.8])
    with pytest.raises(ConfigError, match=r"calibrate.budgets=\[0.8\]: .*'\.\[search\]'") as caught:
        run_stage(experiment, "calibrate")
    assert "\n" not in str(caught.value)
    assert not experiment.folder("calibrate").exists()
    made(make_experiment, runs).check("calibrate")


@pytest.mark.parametrize("share_mask", [False, True])
def test_temperatures_of_the_tau_found(make_experiment, runs, monkeypatch, share_mask):
    """They match entropies under the configured guidance, on training images. The tiny models were
    hardly trained, and are far from each other."""
    monkeypatch.setattr("dmoe_var.calibration.temperature.GRID", np.linspace(0.05, 8, 40))
    given = {"calibrate.temperature": True, "calibrate.refinements": 0}
    changes = {**FEW, **given, "sampling.share_mask": share_mask}
    experiment = make_experiment(runs, changes=changes)
    record = run_stage(experiment, "calibrate")
    bench, found = CalibrationBench(experiment), record.about["temperature"]
    assert [t != 1 for t in found] == [si in bench.model.moe_scales for si in range(4)]
    rules = [Threshold(tau) for tau in record.about["tau"]]
    assert experiment.config.sampling.cfg == 1.5
    given = (bench.images[0], rules, (0.0, 0.5, 1.0, 1.5))
    assert tuple(found) == temperatures(bench.model, *given, "reference", share_mask)
    plain = made(make_experiment, runs, refinements=0)
    assert experiment.fingerprint("calibrate") != plain.fingerprint("calibrate")


def test_by_layer(make_experiment, runs):
    experiment = made(make_experiment, runs, by_layer=True, loss="norm")
    record = run_stage(experiment, "calibrate")
    assert [len(of_scale) for of_scale in record.about["tau"]] == [1, 1]  # one layer
    evaluated = make_experiment(
        runs,
        changes={"selection.layer_tau": record.about["tau"], "evaluate.num_samples": 60},
    )
    share = run_stage(evaluated, "evaluate").metrics["flops_gmac"] / record.metrics["dense_gmac"]
    assert share == pytest.approx(0.85, rel=0.015)


@pytest.mark.parametrize("key", ["budget", "budgets"])
def test_a_share_out_of_reach_is_one_line(make_experiment, runs, key):
    experiment = made(make_experiment, runs, **{key: 0.1 if key == "budget" else [0.1, 0.9]})
    with pytest.raises(
        InputError, match=r"calibrate.budgets?=0\.1: out of reach.*allowed: 0\.\d+ to 1"
    ):
        run_stage(experiment, "calibrate")


def test_time_out_of_reach_is_one_line(make_experiment, runs):
    experiment = made(make_experiment, runs, budget_ms=0.001)
    with pytest.raises(InputError, match=r"budget_ms=0\.001: out of reach.*dense model"):
        run_stage(experiment, "calibrate")


def table(dense, found):
    return CostTable(1.0, {}, dense, {"found": found})


def test_no_tau_that_is_slower_than_dense(make_experiment, runs, monkeypatch):
    """The table promises what the second timing does not keep."""
    tables = [
        CostTable(1.0, dict.fromkeys((2, 3), ((0.1, 1.0), (1.0, 9.0))), 12.0, {}),
        table(dense=12.0, found=13.0),
    ]
    monkeypatch.setattr(calibrate, "measure_costs", lambda *a, **k: tables.pop(0))
    experiment = made(make_experiment, runs, budget_ms=11.0)
    with pytest.raises(InputError, match=r"takes 13\.0 ms.*dense model 12\.0 ms; none is returned"):
        run_stage(experiment, "calibrate")


def test_a_time_budget(make_experiment, runs, monkeypatch):
    """Times linear in the share of experts: the budget is met where the table says."""
    points = ((0.25, 3.0), (1.0, 12.0))
    tables = [CostTable(1.0, {2: points, 3: points}, 30.0, {}), table(dense=30.0, found=11.0)]
    monkeypatch.setattr(calibrate, "measure_costs", lambda *a, **k: tables.pop(0))
    record = run_stage(made(make_experiment, runs, budget_ms=17.0), "calibrate")
    bench = CalibrationBench(made(make_experiment, runs, budget_ms=17.0))
    shares = bench.drawn([Threshold(t) for t in record.about["tau"]], 5).expert_share
    assert 1 + sum(12 * share for share in shares.values()) == pytest.approx(17, rel=0.05)
    assert record.metrics["measured_ms"] == 11
    assert record.metrics["predicted_ms"] == pytest.approx(17, rel=1e-6)


def test_cross_entropy(make_experiment, runs):
    """Of the sparse scales alone, by hand; with every expert and one rule a scale."""
    experiment = make_experiment(runs)
    model, vqvae = loaded.dynamic(experiment), loaded.vqvae(experiment)
    tokens, _ = token_sets(experiment, vqvae)
    images = TeacherForced(tokens, vqvae, 10, 4)
    loss = CrossEntropy(model, images, "grouped")
    found = loss([Threshold(0.0), Threshold(0.9)])
    indices = torch.arange(10) * len(tokens) // 10
    tokens_BL, labels_B = tokens.batch(indices)
    teacher = vqvae.teacher_input(tokens.by_scale(tokens_BL))
    logits = model(labels_B, teacher, tau=[0.0, 0.9])
    target = tokens_BL
    by_scale = [
        F.cross_entropy(logits[:, scale].flatten(0, 1), target[:, scale].flatten()).item()
        for scale in (slice(5, 14), slice(14, 30))
    ]
    assert found == pytest.approx(sum(by_scale) / 2, rel=1e-5)
    by_tokens = CrossEntropy(model, images, "grouped", by_tokens=True)
    assert by_tokens([Threshold(0.0), Threshold(0.9)]) == pytest.approx(
        (9 * by_scale[0] + 16 * by_scale[1]) / 25, rel=1e-5
    )
    assert loss.count == 1


@pytest.mark.parametrize(("key", "value"), [("budget", 0), ("budget", 1.2), ("densities", [1.0])])
def test_wrong_values(make_experiment, key, value):
    with pytest.raises(ConfigError, match=f"calibrate.{key}"):
        make_experiment(changes={f"calibrate.{key}": value})
