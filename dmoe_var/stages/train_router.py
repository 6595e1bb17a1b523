"""Stage 5: routers learn to predict each expert's output norm."""

from __future__ import annotations

from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.experiment.work import Work
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import token_about, token_sets
from dmoe_var.training.loop import train
from dmoe_var.training.router_objective import RouterObjective


def run(work: Work) -> StageResult:
    config = work.config.train_router
    vqvae = loaded.vqvae(work)
    moe = loaded.split(work, "split")
    tokens = token_sets(work, vqvae)
    objective = RouterObjective(moe, vqvae, *tokens, config)
    metrics = train(objective, config, work.training_run("train_router"))
    loaded.save(work, "train_router", moe)
    return StageResult(metrics, about={"checkpoint": "checkpoint", **token_about(tokens)})


STAGE = Stage("train_router", run, reads=("train_router",), needs=("split",), reads_pictures=True)
