"""Stage 6, if asked for: experts and routers train under the mask of tau."""

from __future__ import annotations

import torch

from dmoe_var.config.root import Config
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import token_about, token_sets
from dmoe_var.training.loop import train
from dmoe_var.training.tuning_objective import TuningObjective

START = "tune_experts.start"


def run(experiment: Experiment) -> StageResult:
    """Return the last validation's metrics, and as `..._before` those of experts as they were: one
    tau runs another density after training."""
    config = experiment.config.tune_experts
    vqvae = loaded.vqvae(experiment)
    moe = loaded.split(experiment, "train_router", START)
    model = DynamicVAR(loaded.dense(experiment), moe, experiment.config.moe.scales)
    tokens = token_sets(experiment, vqvae)
    objective = TuningObjective(model, vqvae, *tokens, config)
    with torch.no_grad():
        before = {f"{name}_before": value for name, value in objective.validate().items()}
    metrics = train(objective, config, experiment.training_run("tune_experts"))
    loaded.save(experiment, "tune_experts", model.moe)
    about = {"checkpoint": "checkpoint", **token_about(tokens)}
    return StageResult({**before, **metrics}, about=about)


def look(experiment: Experiment) -> None:
    """Raise CheckpointError if the experts that are given to begin with do not fit."""
    if experiment.config.tune_experts.start is not None:
        loaded.split(experiment, "train_router", START)


def refuse(config: Config) -> None:
    tune = config.tune_experts
    if not tune.on:
        raise ConfigError(
            f"tune_experts.steps={'null' if tune.steps is None else tune.steps}: experts are not "
            "tuned; allowed here: 1 or more, or tune_experts.epochs"
        )
    if tune.blocks and config.conversion.train == "ffn":
        raise ConfigError(
            "tune_experts.blocks=true trains what conversion.train=ffn shares with the dense model;"
            " allowed with it: false"
        )


STAGE = Stage(
    "tune_experts",
    run,
    reads=("tune_experts", "moe.scales"),
    needs=("train_router",),
    refuse=refuse,
    look=look,
    reads_pictures=True,
)
