"""The objectives on tiny models and a few real digits, and runs of the training loop."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from dmoe_var import DynamicVAR
from dmoe_var.data.digits import load_digits
from dmoe_var.data.token_cache import tokenize
from dmoe_var.models.classifier import ClassifierConfig, ResNetClassifier
from dmoe_var.training.classifier_objective import ClassifierObjective, ClassifierTrainingConfig
from dmoe_var.training.loop import train
from dmoe_var.training.objectives import (
    ConversionConfig,
    SparsifyConfig,
    SparsifyObjective,
    VARObjective,
    VARTrainingConfig,
)
from dmoe_var.training.router_objective import RouterConfig, RouterObjective
from dmoe_var.training.step import Run
from dmoe_var.training.tuning_objective import TuneConfig, TuningObjective
from dmoe_var.training.vqvae_objective import VQVAEObjective, VQVAETrainingConfig

NUM_TRAINING, NUM_HELD_OUT = 20, 10
SEED = 3
EVERY_STEP = {"batch_size": 8, "log_every": 1, "validate_every": 2, "checkpoint_every": 3}
CONFIGS = {
    "vqvae": VQVAETrainingConfig,
    "var": VARTrainingConfig,
    "sparsify": SparsifyConfig,
    "router": RouterConfig,
    "classifier": ClassifierTrainingConfig,
    "tune": TuneConfig,
}


@pytest.fixture(scope="session")
def digits():
    """A few training and held-out digits of 8 x 8 pixels."""
    return tuple(
        replace(images, images=images.images[:number], labels=images.labels[:number])
        for images, number in zip(load_digits(8), (NUM_TRAINING, NUM_HELD_OUT), strict=True)
    )


@pytest.fixture(scope="session")
def vqvae(make_vqvae):
    return make_vqvae()


@pytest.fixture(scope="session")
def tokens(digits, vqvae, tmp_path_factory):
    """Training and held-out tokens of `vqvae`."""
    cache = tmp_path_factory.mktemp("tokens")
    return tuple(tokenize(images, vqvae, cache, progress=False) for images in digits)


@pytest.fixture
def build(digits, tokens, vqvae, make_vqvae, make_var, make_moe):
    """build(kind, dtype, conversion, **fields of its configuration) -> objective (a fresh model),
    config. conversion: fields of a ConversionConfig; var: fields of the VARConfig."""

    def build(kind, dtype=torch.float32, conversion=None, var=None, device="cpu", **fields):
        length = {"steps": 6, **({"epochs": None} if kind == "classifier" else {})}
        config = CONFIGS[kind](**{**length, **EVERY_STEP, **fields})
        if kind == "classifier":
            torch.manual_seed(1)
            network = ResNetClassifier(ClassifierConfig(10, 4)).to(device)
            return ClassifierObjective(network, *digits, config), config
        if kind == "vqvae":
            return VQVAEObjective(make_vqvae(seed=1).to(device), *digits, config), config
        act = "gelu" if getattr(config, "activation", "relu") == "gelu" else "relu"
        shape = {"num_classes": 10, "drop_path": 0.2, "label_drop": 0.3, **(var or {})}
        model = make_var(activation=act, **shape)
        given = (copy.deepcopy(vqvae).to(device, dtype), *tokens, config)
        if kind == "router":
            return RouterObjective(make_moe(model).to(device, dtype), *given), config
        if kind == "tune":
            models = make_var(seed=1, **shape), make_moe(model)
            dynamic = DynamicVAR(*(each.to(device, dtype) for each in models), (1, 3))
            return TuningObjective(dynamic, *given), config
        model = model.to(device, dtype)
        if kind == "var":
            return VARObjective(model, *given), config
        dense = make_var(seed=1, **shape).to(device, dtype) if config.distill else None
        asked = ConversionConfig(**conversion or {})
        return SparsifyObjective(model, *given, asked, dense), config

    return build


class Toy:
    """A linear model that learns noise: the smallest Objective."""

    num_examples = 10
    repeatable = False

    def __init__(self, bad_step=None, spoil=None):
        generator = torch.Generator().manual_seed(0)
        self.module = torch.nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.data = torch.randn(self.num_examples, 4, generator=generator)
        self.bad_step, self.spoil = bad_step, spoil

    def loss(self, indices_B, step, num_steps, rows):
        loss = (self.module(self.data[indices_B]) - torch.randn(3)).square().mean()
        return (self.spoil(loss, self.module) if step == self.bad_step else loss), {}

    def after_step(self, step, num_steps):
        pass

    def validate(self):
        return {"val_norm": float(self.module.weight.norm())}


@pytest.fixture(scope="session")
def toy():
    """toy(bad_step=, spoil=) -> objective whose loss is spoil(loss, module) at that step."""
    return Toy


@pytest.fixture
def run_in():
    """run_in(folder, objective, config, snapshots, **fields of Run) -> metrics of a run."""

    def run_in(folder, objective, config, snapshots=None, **fields):
        folder.mkdir(exist_ok=True)
        about = {"fingerprint": "ours", "name": "test", "seed": SEED, "progress": False, **fields}
        return train(objective, config, Run(folder, **about), snapshots)

    return run_in


@pytest.fixture
def batch(tokens, vqvae):
    """Tokens (B, L), labels (B,) and teacher input of the whole training set."""
    return tokens[0].teacher_forced(torch.arange(NUM_TRAINING), vqvae)


@pytest.fixture
def held_out(tokens, vqvae):
    """The same of all held-out images."""
    return tokens[1].teacher_forced(torch.arange(NUM_HELD_OUT), vqvae)
