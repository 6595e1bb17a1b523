"""The models that stages hand to each other: loaded strictly, checked to be the configured ones.

They are float32 whatever precision their files hold: images are coded and models are trained so.
What samples in another precision (`sampling.dtype`) casts them itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dmoe_var.checkpoints import load_var, load_vqvae
from dmoe_var.checkpoints.safetensors_io import build_strictly, save_checkpoint
from dmoe_var.errors import CheckpointError
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.moe.layer import ExpertConfig
from dmoe_var.moe.router import default_hidden
from dmoe_var.stages.work import Work
from dmoe_var.training.distributed import is_main

TRAINING_ONLY = ("drop_path", "label_drop", "adaln_gamma_gain")
"""Fields that shape training, not the function: published files do not hold them."""


def checkpoint(work: Work, stage: str) -> Path:
    return work.folder(stage) / "checkpoint"


def save(work: Work, stage: str, model: VAR | VQVAE) -> None:
    """Write a stage's checkpoint, by the main process, with the fingerprint it belongs to."""
    if is_main():
        save_checkpoint(checkpoint(work, stage), model, work.fingerprint(stage))


def vqvae(work: Work) -> VQVAE:
    """The tokenizer, in eval mode on the work's device."""
    given = work.config.base.vqvae
    source = given if given is not None else checkpoint(work, "train_vqvae")
    model = load_vqvae(source, work.config.vqvae.patch_nums)
    _check(str(source), model.config, work.config.vqvae, ("beta",))
    return model.to(work.device, torch.float32).requires_grad_(False)


def dense(work: Work) -> VAR:
    """The base VAR, in eval mode on the work's device."""
    given = work.config.base.var
    return _var(work, given or checkpoint(work, "train_var"), work.config.var)


def sparse(work: Work) -> VAR:
    """The fine-tuned VAR, not split."""
    config = replace(work.config.var, activation=work.config.sparsify.activation)
    return _var(work, checkpoint(work, "sparsify"), config)


def split(work: Work, stage: str = "train_router") -> VAR:
    """The expert VAR as a stage left it: `split` (untrained routers) or `train_router`."""
    hidden = work.config.split.router_hidden or default_hidden(work.config.var.C)
    config = replace(
        work.config.var,
        activation=work.config.sparsify.activation,
        experts=ExpertConfig(work.config.split.expert_size, hidden),
    )
    return _var(work, checkpoint(work, stage), config)


def var(work: Work, stage: str) -> VAR:
    """The VAR as a stage left it, in eval mode on the work's device: of train_var (or given),
    sparsify, split or train_router."""
    if stage in ("split", "train_router"):
        return split(work, stage)
    return {"train_var": dense, "sparsify": sparse}[stage](work)


def dynamic(work: Work) -> DynamicVAR:
    """Dense and expert VAR joined at `moe.scales`."""
    return DynamicVAR(dense(work), split(work), work.config.moe.scales)


def _var(work: Work, source: str | Path, expected: VARConfig) -> VAR:
    model = load_var(source)
    config = model.config
    if config.experts is not None and config.experts.router_hidden is None:
        experts = ExpertConfig(config.experts.expert_size, default_hidden(config.C))
        config = replace(config, experts=experts)
    _check(str(source), config, expected, TRAINING_ONLY)
    configured = build_strictly(lambda: VAR(expected), model.state_dict(), source)
    return configured.to(work.device, torch.float32)


def _check(source: str, found: object, expected: object, free: tuple[str, ...]) -> None:
    differs = [
        f"{name} is {value}, the configuration says {getattr(expected, name)}"
        for name, value in vars(found).items()
        if name not in free and value != getattr(expected, name)
    ]
    if differs:
        raise CheckpointError(f"{source}: belongs to another configuration: {'; '.join(differs)}")
