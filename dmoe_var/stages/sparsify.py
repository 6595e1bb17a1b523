"""Stage 3: GELU becomes ReLU, and fine-tuning with the Hoyer loss makes activations sparse."""

from __future__ import annotations

from dmoe_var.conversion.relufication import relufy
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import token_about, token_metrics, token_sets
from dmoe_var.training.loop import train
from dmoe_var.training.objectives import SparsifyObjective


def run(experiment: Experiment) -> StageResult:
    config = experiment.config.sparsify
    vqvae = loaded.vqvae(experiment)
    var = loaded.dense(experiment)
    if config.activation == "relu":
        var = relufy(var)
    dense = loaded.dense(experiment) if config.distill else None
    tokens = token_sets(experiment, vqvae)
    conversion = experiment.config.conversion
    objective = SparsifyObjective(var, vqvae, *tokens, config, conversion, dense)
    metrics = train(objective, config, experiment.training_run("sparsify"))
    loaded.save(experiment, "sparsify", var)
    return StageResult(
        {**metrics, **token_metrics(tokens)},
        about={"checkpoint": "checkpoint", **token_about(tokens)},
    )


STAGE = Stage(
    "sparsify",
    run,
    reads=("sparsify", "conversion"),
    needs=("train_var",),
    reads_pictures=True,
)
