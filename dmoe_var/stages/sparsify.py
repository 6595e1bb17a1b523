"""Stage 3: GELU becomes ReLU, and fine-tuning with the Hoyer loss makes activations sparse."""

from __future__ import annotations

from dmoe_var.conversion.relufication import relufy
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.experiment.work import Work
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import token_about, token_metrics, token_sets
from dmoe_var.training.loop import train
from dmoe_var.training.objectives import SparsifyObjective


def run(work: Work) -> StageResult:
    config = work.config.sparsify
    vqvae = loaded.vqvae(work)
    var = loaded.dense(work)
    if config.activation == "relu":
        var = relufy(var)
    tokens = token_sets(work, vqvae)
    objective = SparsifyObjective(var, vqvae, *tokens, config, work.config.conversion)
    metrics = train(objective, config, work.training_run("sparsify"))
    loaded.save(work, "sparsify", var)
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
