"""Which folder a stage works in, and what its result depends on."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields

import pytest
import torch

from dmoe_var.devices import chosen_device
from dmoe_var.errors import ConfigError, InputError
from dmoe_var.experiment.stage import STAGES
from dmoe_var.training.step import OptimConfig
from dmoe_var.training.tracking import Tracking

TRAINING = ("train_vqvae", "train_var", "sparsify", "split", "train_router", "tune_experts")
MEASURING = (
    "sample", "evaluate", "sweep", "export", "calibrate", "maps", "report", "find_recipe",
)  # fmt: skip
TIMED = {"benchmark"}
"""Reads the base models and how images are drawn."""


def from_(stage):
    """A stage and all that build on it."""
    return {*TRAINING[TRAINING.index(stage) :], *MEASURING}


def variants(experiment):
    return {stage: experiment.variant(stage) for stage in STAGES}


def other_than(plain, experiment):
    """The stages whose results may differ."""
    return {stage for stage in STAGES if experiment.fingerprint(stage) != plain.fingerprint(stage)}


HOUSEKEEPING = [
    {"run_dir": "elsewhere", "name": "other", "until": "split"},
    {"device": "auto", "threads": 2, "progress": True, "wandb": "offline"},
    {"train_vqvae.log_every": 3, "sparsify.validate_every": 7, "train_var.checkpoint_every": 9},
    {"sparsify.micro_batch_size": 2, "sparsify.activation_checkpointing": True},
    {"figures.figure": "4", "figures.make": True, "figures.plan": True},
    {"sweep.parts": 2, "sweep.part": 1},
    {"sampling.batch_size": 3, "sampling.cuda_graphs": True, "fidelity.batch_size": 5},
    {"sampling.skipping.first_layer": 0, "sampling.skipping.source": 1},  # nothing is skipped
    {"sampling.heads.measure": "bound"},
    {"train_classifier.log_every": 3, "train_classifier.checkpoint_every": 7},
]


@pytest.mark.parametrize(
    "changes", [{}, {"train_var.lr": 0.001}, {"moe.scales": (2, 3)}, *HOUSEKEEPING]
)
def test_what_does_not_change_a_result_changes_no_folder(make_experiment, changes):
    experiment, plain = make_experiment(changes=changes), make_experiment()
    assert set(variants(experiment).values()) == {"default"}
    assert other_than(plain, experiment) == set()


POINTS = {"sample", "evaluate", "sweep"}
SHOWN = {"maps", "report"}
DRAWN = {"figures"}
CLASSIFIER = {"train_classifier"}
CALIBRATED = {"calibrate", "find_recipe"}

READ_BY = [
    ({"seed": 1}, from_("train_vqvae") | CLASSIFIER | DRAWN),
    ({"dtype": "bfloat16"}, from_("train_vqvae") | CLASSIFIER | DRAWN),
    ({"vqvae.beta": 0.5}, from_("train_vqvae") | TIMED | DRAWN),
    ({"base.vqvae": "digits"}, from_("train_vqvae") | TIMED | DRAWN),
    ({"train_vqvae.restart_every": 5}, from_("train_vqvae") | DRAWN),
    ({"var.depth": 2}, from_("train_var") | TIMED | DRAWN),
    ({"base.var": "digits"}, from_("train_var") | TIMED | DRAWN),
    ({"train_var.betas": [0.9, 0.99]}, from_("train_var") | DRAWN),
    ({"train_var.scale_weights": [1, 1, 1, 1]}, from_("train_var") | DRAWN),
    ({"sparsify.alpha": 0.1}, from_("sparsify") | DRAWN),
    ({"sparsify.distill": 0.5}, from_("sparsify") | DRAWN),
    ({"split.router_hidden": 3}, from_("split") | DRAWN),
    ({"train_router.scales": [3]}, from_("train_router") | DRAWN),
    ({"tune_experts.tau": 0.6}, {"tune_experts"} | DRAWN),  # it is off
    ({"tune_experts.steps": 5}, from_("tune_experts") | DRAWN),
    ({"train_router.condition": "both"}, from_("train_router") | DRAWN),
    ({"moe.impl": "reference"}, POINTS | SHOWN | CALIBRATED | {"export"} | DRAWN),
    ({"sampling.cfg": 2}, POINTS | SHOWN | CALIBRATED | TIMED | DRAWN | {"export"}),
    (
        {"sampling.skipping.ratios": [0, 0, 0, 0.5], "sampling.skipping.first_layer": 0},
        POINTS | SHOWN | CALIBRATED | TIMED | DRAWN | {"export"},
    ),
    (
        {"sampling.heads.ratios": [0, 0, 0, 0.5]},
        POINTS | SHOWN | CALIBRATED | TIMED | DRAWN | {"export"},
    ),
    ({"selection.tau": 0.5}, {"sample", "evaluate", "export"} | SHOWN | DRAWN),
    ({"evaluate.seed": 1}, {"evaluate"} | TIMED),
    ({"evaluate.num_samples": 30}, {"evaluate", "sweep", "report"} | DRAWN),
    ({"fidelity.input_size": 96}, {"evaluate", "sweep", "report", "find_recipe"} | DRAWN),
    ({"sample.per_class": 2}, {"sample"} | DRAWN),
    ({"conversion.train": "ffn"}, from_("sparsify") | DRAWN),
    ({"export.private": False}, {"export"}),
    ({"benchmark.repeats": 3}, TIMED | DRAWN),
    ({"sweep.last": [0.2]}, {"sweep", "report"} | DRAWN),
    ({"sweep.lists.more": [0.2]}, {"sweep", "report"} | DRAWN),
    ({"pruning.share": 0.3}, DRAWN),
    ({"maps.images": 3}, {"maps"} | DRAWN),
    ({"calibrate.loss": "norm"}, CALIBRATED | DRAWN),
    ({"find_recipe.budget": 0.3}, {"find_recipe"}),
    ({"report.seed": 1}, {"report"}),
    ({"figures.tau": [0.3]}, DRAWN),
    ({"train_classifier.width": 16}, CLASSIFIER),
    ({"fidelity.classifier": "resnet"}, {"evaluate", "sweep", "report", "find_recipe"} | DRAWN),
]


@pytest.mark.parametrize(("changes", "affected"), READ_BY)
def test_a_key_changes_the_stages_that_depend_on_it_and_no_others(
    make_experiment, changes, affected
):
    experiment, plain = make_experiment(changes=changes), make_experiment()
    assert {
        stage for stage, variant in variants(experiment).items() if variant != "default"
    } == affected
    assert affected == other_than(plain, experiment)


@pytest.mark.parametrize(("changes", "affected"), READ_BY[::6])
def test_an_edited_experiment_keeps_its_folders_but_is_not_done(make_experiment, changes, affected):
    experiment = make_experiment(edited=changes)
    assert set(variants(experiment).values()) == {"default"}
    assert affected == other_than(make_experiment(), experiment)


TRAINED_BY = {
    "steps": 3, "batch_size": 4, "lr": 0.01, "lr_end": 0.001, "schedule": "constant",
    "warmup": 0.1, "betas": [0.8, 0.9], "weight_decay": 0.2, "clip": 0.5,
    "ema": 0.5,
}  # fmt: skip
"""Another value for every setting of training that changes its result."""
NO_RESULT = {"log_every", "validate_every", "checkpoint_every", "micro_batch_size"}


def test_every_setting_of_training_is_known():
    """`epochs` stands in the place of `steps`."""
    known = TRAINED_BY.keys() | NO_RESULT | {"epochs"}
    assert {each.name for each in fields(OptimConfig)} == known


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        *(("sparsify", key) for key in TRAINED_BY),
        *((stage, "clip") for stage in ("train_vqvae", "train_var", "train_router")),
    ],
)
def test_how_a_stage_trains_is_part_of_what_it_is(make_experiment, stage, key):
    experiment = make_experiment(changes={f"{stage}.{key}": TRAINED_BY[key]})
    assert other_than(make_experiment(), experiment) == from_(stage) | DRAWN


GRID = {
    "selection.tau": [0.1, [0.1, 0.2], [0.2, 0.1]],
    "train_var.lr": [1e-4, 1e-2],
}
CUT = ("x" * 80 + "1", "x" * 80 + "2", "a/b", "a-b", "../b")


def test_points_of_a_multirun_never_share_a_folder(make_experiment):
    """Whatever the names are cut to; folders are plain names."""
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    points += [{"base.vqvae": path} for path in CUT]
    names = [make_experiment(changes=point).variant("evaluate") for point in points]
    assert len(set(names)) == len(points)
    assert all(re.fullmatch(r"[A-Za-z0-9=._+-]{1,70}", name) for name in names)


EXPERTS = {"selection.tau": 0.9, "moe.impl": "reference", "split.expert_size": 64}
PRUNED = {"evaluate.model": "pruned"}


@pytest.mark.parametrize(
    ("point", "needs", "unread", "read"),
    [
        ({}, "train_router", {"pruning.share": 0.1, "pruning.model": "sparse"}, EXPERTS),
        (
            {"evaluate.model": "dense"},
            "train_var",
            {**EXPERTS, "moe.scales": [3], "sparsify.alpha": 0.1, "pruning.share": 0.1},
            {"train_var.lr": 0.5},
        ),
        (
            PRUNED,
            "train_var",
            {**EXPERTS, "train_router.lr": 0.5, "sparsify.alpha": 0.1},
            {
                "pruning.share": 0.6, "pruning.rule": "mean_signed", "pruning.model": "sparse",
                "pruning.images": 3, "moe.scales": [3], "sampling.top_k": 3, "train_var.lr": 0.5,
                "evaluate.seed": 1,
            },
        ),
        (
            {**PRUNED, "pruning.model": "sparse"},
            "sparsify",
            {**EXPERTS, "train_router.lr": 0.5},
            {"sparsify.alpha": 0.1},
        ),
        *(
            (
                {"selection.rule": rule, "selection.k": 2},
                "split",
                {"train_router.lr": 0.5},
                {"split.expert_size": 64},
            )
            for rule in ("oracle", "random", "all", "keys")
        ),
    ],
)  # fmt: skip
def test_what_a_point_depends_on(make_experiment, point, needs, unread, read):
    """Its model: dense points not on experts, pruned ones not on the model that is not pruned."""
    plain = make_experiment(changes=point)
    assert plain.needs("evaluate") == (needs,)
    for changes, same in ((unread, True), (read, False)):
        for key, value in changes.items():
            experiment = make_experiment(changes={**point, key: value})
            assert (experiment.fingerprint("evaluate") == plain.fingerprint("evaluate")) == same, (
                key
            )
            assert (experiment.folder("evaluate") == plain.folder("evaluate")) == same, key


def test_training_run(make_experiment, tmp_path):
    experiment = make_experiment(tmp_path, {"dtype": "bfloat16", "seed": 5, "wandb": "offline"})
    run = experiment.training_run("sparsify")
    assert run.folder == tmp_path / "tiny" / "sparsify" / experiment.variant("sparsify")
    assert (run.seed, run.amp_dtype) == (5, torch.bfloat16)
    assert run.tracking == Tracking("offline", "tiny", "sparsify", experiment.variant("sparsify"))
    assert run.fingerprint == experiment.fingerprint("sparsify")
    assert run.config["sparsify.lr"] == experiment.config.sparsify.lr


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there(name):
    backend = torch.backends.mps if name == "mps" else torch.cuda
    if backend.is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(InputError, match=f"device={name}: this machine has no .*; allowed: auto"):
        chosen_device(name)
    assert chosen_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("name", "processes", "expected"),
    [
        ("cuda", 1, "cuda:0"),
        ("auto", 1, "cuda:0"),
        ("cuda:1", 1, "cuda:1"),
        ("auto", 2, "cuda:1"),
        ("cuda", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
        ("cuda:2", 1, "device=cuda:2: allowed: cuda:0 to cuda:1"),
        ("cuda:0", 2, "device=cuda:0: torchrun gives each process its own; allowed: auto, cuda"),
        ("auto", 3, "torchrun started 3 processes; allowed: 2, one a GPU of this machine"),
    ],
)
def test_devices_of_a_machine_with_two_gpus(name, processes, expected, monkeypatch):
    """The last of the processes; a CUDA device always has its index, which torch asks for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    torchrun = {"RANK": 0, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for key, value in {**torchrun, "LOCAL_RANK": processes - 1}.items():
        monkeypatch.setenv(key, str(value))
    try:
        found = str(chosen_device(name))
    except InputError as error:
        found = str(error)
    assert found == expected


def test_lists_of_another_length_are_the_sweeps_fault_alone(make_experiment):
    experiment = make_experiment(
        changes={"sweep.lists": {"ours": [0.1, 0.2, 0.3]}, "sweep.chosen": "ours"}
    )
    experiment.check("evaluate")
    with pytest.raises(ConfigError, match=r"sweep.lists.ours=\[0.1, 0.2, 0.3\] must have 1 or 2"):
        experiment.check("sweep")
