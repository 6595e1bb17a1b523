"""The search for a recipe: the budget is met, the best FID wins, and evaluate reads its file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from dmoe_var import CollaborativeVAR
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.config.recipe import read_recipe
from dmoe_var.errors import ConfigError, InputError
from dmoe_var.experiment.graph import record_if_done, run_stage
from dmoe_var.experiment.points import vary
from dmoe_var.metrics.flops import count_flops
from dmoe_var.stages.evaluate import Bench
from dmoe_var.stages.find_recipe import guidances

ROOT = Path(__file__).resolve().parents[2]
FEW = {
    "find_recipe.num_samples": 20,
    "find_recipe.skipped_tokens": [0.0, 0.5],
    "find_recipe.unguided": [0, 1, 2],
    "moe.mean_images": 8,
    "calibrate.densities": [0.7, 0.4],
    "calibrate.images": 20,
    "calibrate.held_out": 20,
    "calibrate.drawn": 60,
    "calibrate.refinements": 0,
    "sampling.skipping.first_layer": 0,
}


@pytest.fixture(scope="module")
def found(make_experiment, kept_runs):
    """A search for 70 % of the FLOPs, and its record."""
    experiment = make_experiment(kept_runs, edited={**FEW, "find_recipe.budget": 0.7})
    return experiment, run_stage(experiment, "find_recipe")


def test_the_budget_is_met_by_what_runs(found):
    """Counted once more, of other images, under the keys of the recipe."""
    experiment, record = found
    best = vary(experiment, record.about["keys"])
    bench = Bench(best)
    labels = [i % 10 for i in range(100)]
    plain = count_flops(bench.dense, bench.vqvae, labels[:1]).total_gmac
    model, sampling = bench.model(best), best.config.sampling
    rules = best.config.selection.rules() if best.config.evaluate.model == "dynamic" else None
    gmac = count_flops(
        model, bench.vqvae, labels, seed=5, selection=rules, **sampling.options
    ).total_gmac
    assert record.metrics["dense_gmac"] == pytest.approx(plain)
    assert gmac <= 0.72 * plain
    assert record.metrics["flops_share"] == pytest.approx(gmac / plain, rel=0.03)


def test_the_best_of_what_was_tried_within_the_budget(found):
    """Every end of guidance, then skipped tokens and means beside the best: one after the other."""
    _, record = found
    tried = record.about["tried"]
    target = 0.7 * record.metrics["dense_gmac"]
    within = [each for each in tried if each["flops_gmac"] <= 1.01 * target]
    best = min(within, key=lambda each: each["fid"])
    assert record.about["keys"] == best["keys"]
    ends = [each["keys"]["sampling.cfg"] for each in tried]
    assert ends[:3] == [1.5, (1.5, 1.5, 1.5, 0.0), (1.5, 1.5, 0.0, 0.0)]
    assert len({*ends[3:]}) == 1
    assert any("sampling.skipping.ratios" in each["keys"] for each in tried)


def test_guidance_is_tried_once_for_each_model():
    """The first scale is never guided, so that after it every strength ends alike."""
    assert guidances((1.5, (1.5, 1.5, 1.5), 3.0), (0, 1, 2), 3) == [
        1.5, (1.5, 1.5, 0.0), (1.5, 0.0, 0.0), 3.0, (3.0, 3.0, 0.0),
    ]  # fmt: skip
    ended = (1.5, 1.5, 0.0)
    assert guidances((ended,), (0, 1), 3) == [ended]


def test_strengths_of_guidance(make_experiment, kept_runs):
    """Each with every end, the configured one first; the dense model has the same beside it."""
    keys = {"find_recipe.cfg": [3.0, 1.5], "find_recipe.unguided": [1, 2]}
    lean = {"find_recipe.budget": 0.8, "find_recipe.skipped_tokens": [0.0]}
    experiment = make_experiment(kept_runs, edited=FEW, changes={**keys, **lean})
    record = run_stage(experiment, "find_recipe")
    tried = [tuple(each["keys"]["sampling.cfg"]) for each in record.about["tried"]]
    assert tried[:4] == [(c,) * (4 - n) + (0.0,) * n for c in (1.5, 3.0) for n in (1, 2)]
    assert len(tried) == 4 + record.about["keys"].get("evaluate.model", "").count("dynamic")
    guided = {"sampling.cfg": record.about["keys"]["sampling.cfg"], "evaluate.model": "dense"}
    verifying = {"evaluate.seed": 2001, "evaluate.num_samples": 20}
    dense = record_if_done(vary(experiment, {**guided, **verifying}), "evaluate")
    metrics = record.metrics
    assert metrics["dense_guided_fid"] == dense.metrics[dense.about["fidelity"]]
    assert metrics["flops_gmac"] <= metrics["dense_guided_gmac"] < metrics["dense_gmac"]


def test_scales_that_are_drafted(make_experiment, kept_runs, make_var, tmp_path):
    """Each number with each end of guidance; the budget is a share of the drafter's own FLOPs, and
    experts of the refiner save what drafting does not."""
    drafter = make_var(seed=3, num_classes=10, depth=3)
    save_checkpoint(tmp_path / "drafter", drafter)
    keys = {"drafter.var": str(tmp_path / "drafter"), "drafter.scales": 1}
    tries = {"find_recipe.drafted": [1, 3], "find_recipe.unguided": [0, 1]}
    lean = {"find_recipe.skipped_tokens": [0.0], "find_recipe.means": False}
    experiment = make_experiment(
        kept_runs, edited=FEW, changes={**keys, **tries, **lean, "find_recipe.budget": 0.1}
    )
    record = run_stage(experiment, "find_recipe")
    bench, labels = Bench(experiment), [i % 10 for i in range(100)]
    plain = count_flops(drafter, bench.vqvae, labels[:1]).total_gmac
    assert record.metrics["dense_gmac"] == pytest.approx(plain)
    tried = record.about["tried"]
    assert {each["keys"]["drafter.scales"] for each in tried} <= {1, 3}
    for each in tried:
        point = vary(experiment, each["keys"])
        fewer = each["keys"]["evaluate.model"] == "dynamic"
        guided = count_flops(
            CollaborativeVAR(drafter, bench.dense, each["keys"]["drafter.scales"]),
            bench.vqvae, labels[:1], cfg=point.config.sampling.cfg,
        ).total_gmac  # fmt: skip
        assert fewer == (guided > 0.1 * plain)
        rules = point.config.selection.rules() if fewer else None
        gmac = count_flops(
            bench.model(point), bench.vqvae, labels, seed=5, selection=rules,
            **point.config.sampling.options,
        ).total_gmac  # fmt: skip
        assert each["flops_gmac"] == pytest.approx(gmac, rel=0.03)
    assert any(each["keys"]["evaluate.model"] == "dynamic" for each in tried)
    assert record.metrics["flops_gmac"] <= 0.102 * plain
    recipe = read_recipe(experiment.folder("find_recipe") / "recipe.json")
    assert recipe["drafter.var"] == keys["drafter.var"]
    assert recipe["drafter.scales"] in (1, 3)
    assert recipe["var.depth"] == experiment.config.var.depth  # it is refined by no other model
    assert "base.var" in recipe
    assert recipe == json.loads(json.dumps(record.about["keys"]))


def test_evaluate_reads_the_recipe(found, monkeypatch):
    """Its keys stand on the command line before all others; the point that was measured is done."""
    experiment, record = found
    path = experiment.folder("find_recipe") / "recipe.json"
    assert read_recipe(path) == json.loads(json.dumps(record.about["keys"]))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr("sys.argv", ["evaluate", "evaluate.seed=2000", f"recipe={path}"])
    arguments = importlib.import_module("_command_line").read(list)
    keys = dict(each.partition("=")[::2] for each in arguments.overrides)
    assert [*keys][-1] == "evaluate.seed"
    assert {key: json.loads(keys[key]) for key in read_recipe(path)} == read_recipe(path)
    point = vary(
        experiment, {**record.about["keys"], "evaluate.seed": 2000, "evaluate.num_samples": 20}
    )
    assert record_if_done(point, "evaluate") is not None


def test_what_is_refused(make_experiment, kept_runs, tmp_path):
    given = make_experiment(kept_runs, edited={**FEW, "moe.skipped": "mean"})
    with pytest.raises(ConfigError, match=r"moe.skipped=mean: find_recipe chooses it"):
        run_stage(given, "find_recipe")
    none = {**FEW, "find_recipe.drafted": [1]}
    drafter = {"drafter.var": "digits", "drafter.scales": 1, "find_recipe.skipped_tokens": [0.0]}
    for keys, message in (
        (none, r"find_recipe.drafted=\[1\]: there is no drafter"),
        ({**none, **drafter, "find_recipe.drafted": [1, 4]}, r"drafted=4 must be within 0\.\.3"),
        (
            {**drafter, "drafter.scales": 4, "evaluate.model": "dense"},
            r"drafter\.scales=4 must be within 0\.\.3",
        ),
        ({**drafter, "find_recipe.skipped_tokens": [0.4]}, r"\[0\.4\]: .* skip no tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_experiment(kept_runs, edited=keys).check("find_recipe")
    far = {**FEW, "find_recipe.budget": 0.01, "find_recipe.unguided": [0]}
    with pytest.raises(InputError, match=r"find_recipe.budget=0.01: out of reach"):
        run_stage(make_experiment(kept_runs, edited=far), "find_recipe")
    other = tmp_path / "recipe.json"
    other.write_text("{}")
    with pytest.raises(ConfigError, match=r"recipe.json: no recipe"):
        read_recipe(other)
