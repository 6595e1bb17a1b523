"""Stage 2: the dense VAR is trained on cached tokens, or given (`base.var`) and validated."""

from __future__ import annotations

import torch

from dmoe_var.config.root import Config
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.experiment.work import Work
from dmoe_var.models.var import VAR
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import token_about, token_metrics, token_sets
from dmoe_var.training.loop import train
from dmoe_var.training.objectives import VARObjective


def run(work: Work) -> StageResult:
    config = work.config
    vqvae = loaded.vqvae(work)
    tokens = token_sets(work, vqvae)
    given = (vqvae, *tokens, config.train_var)
    if config.base.var is not None:
        objective = VARObjective(loaded.dense(work), *given)
        with torch.no_grad():
            metrics = {**objective.validate(), **token_metrics(tokens)}
            return StageResult(metrics, about={"source": config.base.var, **token_about(tokens)})
    torch.manual_seed(config.seed)
    var = VAR(config.var).to(work.device)
    objective = VARObjective(var, *given)
    metrics = train(objective, config.train_var, work.training_run("train_var"))
    loaded.save(work, "train_var", var)
    return StageResult(
        {**metrics, **token_metrics(tokens)},
        about={"checkpoint": "checkpoint", **token_about(tokens)},
    )


def reads(config: Config, ours: Config) -> Keys:
    trained = ("train_var",) if config.base.var is None else ()
    return ("var", "base.var", *trained)


STAGE = Stage(
    "train_var", run, reads, needs=("train_vqvae",), given="base.var", reads_pictures=True
)
