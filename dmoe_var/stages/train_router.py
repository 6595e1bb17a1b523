"""Stage 5: routers learn to predict each expert's output norm."""

from __future__ import annotations

from dmoe_var.conversion.to_moe import informed
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import token_about, token_sets
from dmoe_var.training.loop import train
from dmoe_var.training.router_objective import RouterObjective


def run(experiment: Experiment) -> StageResult:
    config = experiment.config.train_router
    vqvae = loaded.vqvae(experiment)
    moe = informed(loaded.split(experiment, "split"), config.condition)
    tokens = token_sets(experiment, vqvae)
    objective = RouterObjective(moe, vqvae, *tokens, config)
    metrics = train(objective, config, experiment.training_run("train_router"))
    loaded.save(experiment, "train_router", moe)
    return StageResult(metrics, about={"checkpoint": "checkpoint", **token_about(tokens)})


STAGE = Stage("train_router", run, reads=("train_router",), needs=("split",), reads_pictures=True)
