"""Stage 5: routers learn to predict each expert's output norm."""

from __future__ import annotations

from dmoe_var.stages import models
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.tokens import token_about, token_sets
from dmoe_var.stages.work import Work
from dmoe_var.training.loop import train
from dmoe_var.training.router_objective import RouterObjective


def run(work: Work) -> StageResult:
    config = work.config.train_router
    vqvae = models.vqvae(work)
    moe = models.split(work, "split")
    tokens = token_sets(work, vqvae)
    objective = RouterObjective(moe, vqvae, *tokens, config)
    metrics = train(objective, config, work.training_run("train_router"))
    models.save(work, "train_router", moe)
    return StageResult(metrics, about={"checkpoint": "checkpoint", **token_about(tokens)})
