"""A tiny experiment on a few digits, its stages done once, to copy and to break."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dmoe_var.config.parse import parse_config
from dmoe_var.data.digits import load_digits
from dmoe_var.data.image_sets import all_pixels
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import run_through
from dmoe_var.metrics.flops import fixed_cost

SHARED = {"patch_nums": [1, 2, 3, 4], "vocab_size": 32, "z_channels": 8}
LENGTH = {"steps": 2, "batch_size": 8, "checkpoint_every": 1}
CONTENT = {
    "name": "tiny",
    "device": "cpu",
    "progress": False,
    "data": {"image_size": 8},
    "vqvae": {**SHARED, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attention": False},
    "var": {**SHARED, "depth": 1, "width": 32, "num_heads": 1, "num_classes": 10},
    "base": {"vqvae": None, "var": None},
    **{stage: {**LENGTH} for stage in ("train_vqvae", "train_var", "sparsify", "train_router")},
    "split": {"expert_size": 32},
    "moe": {"scales": [2, 3]},
    "evaluate": {"num_samples": 20},
    "sampling": {"batch_size": 8},
    "sweep": {
        "seeds": [0, 1],
        "last": [0.0, 0.5],
        "lists": {"ours": [0.3, 0.6], "high": [1.0, 1.0]},
        "chosen": "ours",
    },
}


def changed(content, changes):
    """A copy with dotted keys set."""
    content = copy.deepcopy(content)
    for key, value in changes.items():
        *path, last = key.split(".")
        section = content
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return content


@cache
def config(run_dir, changes):
    """The tiny configuration with dotted keys changed; `changes` as JSON."""
    return parse_config(changed(CONTENT, {"run_dir": run_dir, **json.loads(changes)}))


@pytest.fixture(scope="session")
def make_experiment():
    """make_experiment(run_dir, changes, edited) -> Experiment, a tiny one.

    Dotted keys: `changes` as on a command line, `edited` as in the experiment's own file.
    """

    def make_experiment(run_dir=".", changes=None, edited=None):
        edited, changes = edited or {}, changes or {}
        configs = (json.dumps(each) for each in ({**edited, **changes}, edited))
        return Experiment(*(config(str(run_dir), each) for each in configs))

    return make_experiment


class FakeFidelity:
    """The interface of Fidelity; the distance of mean images, at no cost."""

    name = "fid_fake"
    weights_sha256 = "0" * 64

    def __init__(self, config, device):
        self.config = config

    def reference(self, images, cache, key, progress):
        return all_pixels(images).mean()

    def score(self, images, reference, features, progress):
        return {self.name: float(abs(all_pixels(images).mean() - reference))}


def fixed_costs():
    """`fixed_cost`, which traces models of equal shapes once."""
    known = {}

    def cost(model, vqvae, **options):
        shapes = [(k, v.shape) for each in (model, vqvae) for k, v in each.state_dict().items()]
        told = (getattr(model, name, None) for name in ("moe_scales", "drafted_scales"))
        key = str((shapes, *told, options))
        if key not in known:
            known[key] = fixed_cost(model, vqvae, **options)
        return known[key]

    return cost


@pytest.fixture(scope="session")
def use_few_digits():
    """use_few_digits(patch): stages see 40 digits a set, measure FakeFidelity, and count the cost
    of equal models once."""
    cost = fixed_costs()
    few = tuple(
        replace(images, images=images.images[:40], labels=images.labels[:40])
        for images in load_digits(8)
    )

    def use_few_digits(patch):
        patch.setattr("dmoe_var.data.load_digits", lambda image_size: few)
        patch.setattr("dmoe_var.stages.evaluate.Fidelity", FakeFidelity)
        patch.setattr("dmoe_var.stages.evaluate.fixed_cost", cost)

    return use_few_digits


@pytest.fixture(scope="session")
def trained(make_experiment, use_few_digits, tmp_path_factory):
    """A run folder in which all is done up to the routers; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        run_through(make_experiment(folder), "train_router", lambda stage, done: None)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of `trained`, to go on from or to break."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test where a stage runs."""

    def run(experiment, stage, *rest):
        raise AssertionError(f"{stage} runs")

    monkeypatch.setattr("dmoe_var.experiment.graph._run", run)


@pytest.fixture(scope="session")
def images_of():
    """images_of(path of a samples.npz) -> its images."""
    return lambda path: np.load(path)["arr_0"]
