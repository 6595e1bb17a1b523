"""Stage 1: the multi-scale VQ-VAE, trained, or given (`base.vqvae`) and validated."""

from __future__ import annotations

import torch

from dmoe_var.data import load_data
from dmoe_var.experiment.graph import StageResult
from dmoe_var.experiment.work import Work
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.stages import loaded
from dmoe_var.training.loop import train
from dmoe_var.training.vqvae_objective import VQVAEObjective


def run(work: Work) -> StageResult:
    config = work.config
    training, held_out = load_data(config.data)
    if config.base.vqvae is not None:
        objective = VQVAEObjective(loaded.vqvae(work), training, held_out, config.train_vqvae)
        with torch.no_grad():
            return StageResult(objective.validate(), about={"source": config.base.vqvae})
    torch.manual_seed(config.seed)
    vqvae = VQVAE(config.vqvae).to(work.device)
    objective = VQVAEObjective(vqvae, training, held_out, config.train_vqvae)
    metrics = train(objective, config.train_vqvae, work.training_run("train_vqvae"))
    loaded.save(work, "train_vqvae", vqvae)
    return StageResult(metrics, about={"checkpoint": "checkpoint"})
