"""Stage 2: the dense VAR, trained on cached tokens, or given (`base.var`) and validated."""

from __future__ import annotations

import torch

from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.models.var import VAR
from dmoe_var.stages import models
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.tokens import token_sets
from dmoe_var.stages.work import Work
from dmoe_var.training.loop import train
from dmoe_var.training.objectives import VARObjective


def run(work: Work) -> StageResult:
    config = work.config
    vqvae = models.vqvae(work)
    tokens = token_sets(work, vqvae)
    if config.base.var is not None:
        objective = VARObjective(models.dense(work), vqvae, *tokens)
        with torch.no_grad():
            return StageResult(objective.validate(), about={"source": config.base.var})
    torch.manual_seed(config.seed)
    var = VAR(config.var).to(work.device)
    objective = VARObjective(var, vqvae, *tokens)
    metrics = train(objective, config.train_var, work.training_run("train_var"))
    save_checkpoint(models.checkpoint(work, "train_var"), var)
    return StageResult(metrics, about={"checkpoint": "checkpoint"})
