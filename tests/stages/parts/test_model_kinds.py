"""Dense, dynamic and pruned points: what each is made of, and how it is told of."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from dmoe_var import DynamicVAR, count_flops
from dmoe_var.conversion.pruning import kept_neurons, mean_activations, prune
from dmoe_var.experiment.graph import run_stage, run_through
from dmoe_var.sampling.sampler import generate
from dmoe_var.stages.evaluate import Bench, describe
from dmoe_var.stages.parts import loaded, model_kinds


@pytest.fixture
def inputs_of_training():
    """inputs_of_training(work, indices): labels and teacher input of training images."""

    def inputs_of_training(experiment, indices):
        vqvae = loaded.vqvae(experiment)
        images = Bench(experiment).training_images
        pictures = torch.from_numpy(images.images[indices]).permute(0, 3, 1, 2).float()
        tokens = vqvae.encode(pictures / 127.5 - 1)
        return torch.from_numpy(images.labels[indices]), vqvae.teacher_input(tokens)

    return inputs_of_training


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"pruning.rule": "mean_signed", "moe.scales": [1, 3], "sampling.cfg": 0}, "train_var"),
        ({"pruning.model": "sparse", "pruning.share": 0.3, "pruning.images": 15}, "sparsify"),
    ],
)
def test_a_pruned_point(make_experiment, runs, inputs_of_training, images_of, changes, stage):
    """What is pruned, by means taken anew of evenly spread training images, is what was drawn
    from, counted and written down."""
    experiment = make_experiment(runs, {"evaluate.model": "pruned", **changes})
    record = run_stage(experiment, "evaluate")
    pruning, scales = experiment.config.pruning, experiment.config.moe.scales
    dense, given = loaded.dense(experiment), loaded.var(experiment, stage)
    indices = [0, 2, 5, 8, 10, 13, 16, 18, 21, 24, 26, 29, 32, 34, 37]
    of_means = inputs_of_training(experiment, indices if pruning.images == 15 else list(range(40)))
    signed = pruning.rule == "mean_signed"
    means = mean_activations(given, [of_means], scales, signed)
    kept = [kept_neurons(means_H, pruning.share).tolist() for means_H in means]
    stored = json.loads((experiment.folder("evaluate") / "pruning.json").read_text())
    assert stored == {"hidden": 128, "kept": kept}
    assert record.about["pruning"] == "pruning.json"
    assert record.about["kept_neurons"] == len(kept[0]) == 128 - int(128 * pruning.share)

    model = DynamicVAR(dense, prune(given, pruning.share, means), scales)
    cfg = experiment.config.sampling.cfg
    counted = count_flops(model, loaded.vqvae(experiment), [0], cfg=cfg)
    assert record.metrics["flops_gmac"] == pytest.approx(counted.total_gmac)
    assert record.metrics["flops_gmac_authors"] == pytest.approx(counted.total_gmac)
    assert record.about["guidance"] == (cfg != 0)
    assert len(record.about["flops_histogram"]["images"]) == 1
    image = generate(model, loaded.vqvae(experiment), [3], seed=0, start_index=3, cfg=cfg)
    drawn = images_of(experiment.folder("evaluate") / "samples.npz")[3]
    assert np.abs(image[0].permute(1, 2, 0).numpy() * 255 - drawn).max() < 0.51


def test_means_are_over_the_whole_set(make_experiment, runs, inputs_of_training, monkeypatch):
    """Every image that they are taken over, which lie evenly: in all batches, with its label."""
    seen = []

    def record(var, inputs, scales, signed):
        seen.extend(inputs)
        return [torch.rand(var.config.hidden)]

    monkeypatch.setattr(model_kinds, "mean_activations", record)
    experiment = make_experiment(runs, {"evaluate.model": "pruned", "pruning.images": 37})
    Bench(experiment).model(experiment)
    indices = [i * 40 // 37 for i in range(37)]
    labels, teacher = inputs_of_training(experiment, indices)
    assert torch.cat([labels_B for labels_B, _ in seen]).tolist() == labels.tolist()
    torch.testing.assert_close(torch.cat([teacher_B for _, teacher_B in seen]), teacher)


RULES = [
    ({"selection.rule": "oracle", "selection.tau": 0.5}, "split", None),
    ({"selection.rule": "random", "selection.k": 3}, "split", 3),
    ({"selection.rule": "all"}, "split", 4),
    ({"selection.rule": "keys", "selection.tau": 0.5}, "split", None),
    ({"selection.rule": "top_k", "selection.k": 1}, "train_router", 1),
    ({"selection.rule": "cumulative", "selection.share": 0.6}, "train_router", None),
]


@pytest.mark.parametrize(("changes", "stage", "experts"), RULES)
def test_every_rule_goes_the_same_way(make_experiment, runs, changes, stage, experts):
    """Through the same sampler, counter and distance; a router is loaded only where the rule reads
    its scores, and counted as other scores are."""
    experiment = make_experiment(runs, changes)
    if stage == "split":
        shutil.rmtree(experiment.folder("train_router"))
    assert experiment.needs("evaluate") == (stage,)
    metrics = run_stage(experiment, "evaluate").metrics
    assert metrics["fid_fake"] >= 0
    scored = stage == "train_router" or changes["selection.rule"] == "keys"
    assert (metrics["flops_router_gmac"] > 0) == scored
    pairs = [2 * n * 4 * metrics[f"experts_share_scale{si}"] for si, n in ((2, 9), (3, 16))]
    assert metrics["flops_experts_gmac"] == pytest.approx(sum(pairs) * 2 * 32 * 32 / 1e9)
    if experts is None:
        assert 0.25 <= metrics["experts_share_scale3"] < 1
        assert metrics["flops_gmac_authors"] < metrics["flops_gmac"]
    else:
        assert pairs == pytest.approx([2 * 9 * experts, 2 * 16 * experts])
        charge = 1 + 0.1 * math.log10(4 - experts + 1)
        spared = metrics["flops_experts_gmac"] * (1 - 1 / charge)
        assert metrics["flops_gmac"] - metrics["flops_gmac_authors"] == pytest.approx(spared)


def test_one_bench_serves_points_of_different_models(make_experiment, runs, monkeypatch):
    """Each point gets its own work's models, loaded once as long as they do not change."""
    asked, var = [], loaded.var

    def counted(experiment, stage):
        asked.append((stage, experiment.config.split.expert_size, experiment.config.sparsify.alpha))
        return var(experiment, stage)

    rule = {"selection.rule": "random", "selection.k": 2}
    works = [
        make_experiment(runs, rule),
        make_experiment(runs, {**rule, "evaluate.seed": 1}),
        make_experiment(runs, {**rule, "split.expert_size": 16}),
        make_experiment(runs, {**rule, "sparsify.alpha": 0.5}),
        make_experiment(runs, {"evaluate.model": "pruned"}),
        make_experiment(runs, {"evaluate.model": "pruned", "pruning.share": 0.7}),
        make_experiment(runs, {"evaluate.model": "pruned", "pruning.model": "sparse"}),
    ]
    for experiment in works:
        run_through(experiment, experiment.needs("evaluate")[0], lambda stage, done: None)
    alone = [Bench(experiment).model(experiment).state_dict() for experiment in works]
    bench = Bench(make_experiment(runs))
    monkeypatch.setattr(loaded, "var", counted)
    for experiment, expected in zip(works, alone, strict=True):
        found = bench.model(experiment).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    alpha = works[0].config.sparsify.alpha
    assert asked == [
        ("train_var", 32, alpha), ("split", 32, alpha), ("split", 16, alpha), ("split", 32, 0.5),
        ("sparsify", 32, alpha),
    ]  # fmt: skip
    assert bench.dense is bench.var_of(works[0], "train_var")


def test_means_are_taken_once_for_all_shares(make_experiment, runs, monkeypatch):
    calls, taken = [], model_kinds.mean_activations
    monkeypatch.setattr(
        model_kinds, "mean_activations", lambda *given: calls.append(given) or taken(*given)
    )
    bench, signed = Bench(make_experiment(runs)), {"pruning.rule": "mean_signed"}
    for changes in ({}, signed, {"pruning.share": 0.2}, {**signed, "evaluate.seed": 1}):
        bench.model(make_experiment(runs, {"evaluate.model": "pruned", **changes}))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"evaluate.model": "dense"}, "dense seed 0"),
        (
            {"evaluate.model": "pruned", "pruning.model": "sparse", "evaluate.seed": 3},
            "sparse pruned by 0.5 (mean_abs) at scales 2,3 seed 3",
        ),
        ({"selection.tau": [0.25, 0.5]}, "threshold 0.25,0.5 at scales 2,3 seed 0"),
        ({"selection.rule": "all", "moe.scales": [1]}, "all at scales 1 seed 0"),
    ],
)
def test_description(make_experiment, changes, text):
    assert describe(make_experiment(changes=changes)) == text
