"""Stage 2: the dense VAR is trained on cached tokens, or given (`base.var`) and validated."""

from __future__ import annotations

from pathlib import Path

import torch

from dmoe_var.checkpoints import load_var
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.config.root import Config
from dmoe_var.experiment.contents import naming
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.models.var import VAR
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import token_about, token_metrics, token_sets
from dmoe_var.training.loop import Snapshots, train
from dmoe_var.training.objectives import VARObjective

SNAPSHOTS = "snapshots"


def run(experiment: Experiment) -> StageResult:
    config = experiment.config
    vqvae = loaded.vqvae(experiment)
    tokens = token_sets(experiment, vqvae)
    given = (vqvae, *tokens, config.train_var)
    if config.base.var is not None:
        objective = VARObjective(loaded.dense(experiment), *given)
        with torch.no_grad():
            metrics = {**objective.validate(), **token_metrics(tokens)}
            return StageResult(metrics, about={"source": config.base.var, **token_about(tokens)})
    torch.manual_seed(config.seed)
    var = _new(config).to(experiment.device)
    objective = VARObjective(var, *given)
    objective.weight_scales(config.train_var.scale_weights)
    run = experiment.training_run("train_var")
    metrics = train(objective, config.train_var, run, _keep(experiment, var))
    loaded.save(experiment, "train_var", var)
    return StageResult(
        {**metrics, **token_metrics(tokens)},
        about={"checkpoint": "checkpoint", **token_about(tokens)},
    )


def look(experiment: Experiment) -> None:
    """Raise CheckpointError if the model that is given, or given to begin with, does not fit."""
    config = experiment.config
    if config.base.var is not None:
        loaded.dense(experiment)
    elif config.train_var.start is not None:
        _new(config)


def _new(config: Config) -> VAR:
    """Build the VAR to train, with new weights or those of `train_var.start`."""
    var, start = VAR(config.var), config.train_var.start
    if start is not None:
        with naming("train_var.start", start):
            there = load_var(start)
            loaded.check_shape(start, there.config, config.var, loaded.TRAINING_ONLY)
        var.load_state_dict(there.state_dict())
    return var


def snapshots(experiment: Experiment) -> dict[int, Path]:
    """List the models that training has left on its way, which base.var takes, by their step."""
    folder = experiment.folder("train_var") / SNAPSHOTS
    return {int(path.name): path for path in sorted(folder.glob("[0-9]*"))}


def _keep(experiment: Experiment, var: VAR) -> Snapshots | None:
    every = experiment.config.train_var.snapshot_every
    if every is None:
        return None
    folder = experiment.folder("train_var") / SNAPSHOTS
    about = (experiment.fingerprint("train_var"), experiment.config.max_file_mb)
    return Snapshots(every, lambda step: save_checkpoint(folder / f"{step:06d}", var, *about))


def reads(config: Config, ours: Config) -> Keys:
    trained = ("train_var",) if config.base.var is None else ()
    return ("var", "base.var", *trained)


STAGE = Stage(
    "train_var",
    run,
    reads,
    needs=("train_vqvae",),
    given="base.var",
    look=look,
    reads_pictures=True,
)
