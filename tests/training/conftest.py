"""The four objectives on tiny models and a few real digits, and runs of the training loop."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dmoe_var.data.digits import load_digits
from dmoe_var.data.token_cache import tokenize
from dmoe_var.training.loop import OptimConfig, Run, train
from dmoe_var.training.objectives import SparsifyConfig, SparsifyObjective, VARObjective
from dmoe_var.training.router_objective import RouterConfig, RouterObjective
from dmoe_var.training.vqvae_objective import VQVAEObjective, VQVAETrainingConfig

NUM_TRAINING, NUM_HELD_OUT = 20, 10
EVERY_STEP = {"batch_size": 8, "log_every": 1, "validate_every": 2, "checkpoint_every": 3}
CONFIGS = {
    "vqvae": VQVAETrainingConfig,
    "var": OptimConfig,
    "sparsify": SparsifyConfig,
    "router": RouterConfig,
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
    """build(kind, **fields of its configuration) -> objective (a fresh model), config."""

    def build(kind, **fields):
        config = CONFIGS[kind](**{"steps": 6, **EVERY_STEP, **fields})
        if kind == "vqvae":
            return VQVAEObjective(make_vqvae(seed=1), *digits, config), config
        act = "gelu" if getattr(config, "activation", "relu") == "gelu" else "relu"
        var = make_var(num_classes=10, activation=act, drop_path=0.2, label_drop=0.3)
        if kind == "var":
            return VARObjective(var, vqvae, *tokens), config
        if kind == "sparsify":
            return SparsifyObjective(var, vqvae, *tokens, config), config
        return RouterObjective(make_moe(var), vqvae, *tokens, config), config

    return build


class Toy:
    """A linear model that learns noise: the smallest Objective."""

    num_examples = 10

    def __init__(self, bad_step=None, spoil=None):
        generator = torch.Generator().manual_seed(0)
        self.module = torch.nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.data = torch.randn(self.num_examples, 4, generator=generator)
        self.bad_step, self.spoil = bad_step, spoil

    def loss(self, indices_B, step, num_steps):
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
    """run_in(folder, objective, config, fingerprint=) -> metrics of a training run."""

    def run_in(folder, objective, config, fingerprint="ours"):
        folder.mkdir(exist_ok=True)
        run = Run(folder, fingerprint, name="test", seed=3, progress=False)
        return train(objective, config, run)

    return run_in


@pytest.fixture
def batch(tokens, vqvae):
    """Tokens (B, L), labels (B,) and teacher input of the whole training set."""
    tokens_BL, labels_B = tokens[0].batch(torch.arange(NUM_TRAINING))
    teacher_BLC = vqvae.teacher_input(tokens[0].by_scale(tokens_BL))
    return SimpleNamespace(tokens_BL=tokens_BL, labels_B=labels_B, teacher_BLC=teacher_BLC)
