"""Stage 1: the multi-scale VQ-VAE is trained, or given (`base.vqvae`) and validated."""

from __future__ import annotations

import torch

from dmoe_var.config.root import Config
from dmoe_var.data import load_data
from dmoe_var.distributed import launched_processes
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.stages.parts import loaded
from dmoe_var.training.loop import train
from dmoe_var.training.vqvae_objective import VQVAEObjective, VQVAETrainingConfig


def run(experiment: Experiment) -> StageResult:
    config = experiment.config
    training, held_out = load_data(config.data)
    if config.base.vqvae is not None:
        untrained = VQVAETrainingConfig(steps=1)  # without effect on what is validated
        objective = VQVAEObjective(loaded.vqvae(experiment), training, held_out, untrained)
        with torch.no_grad():
            return StageResult(objective.validate(), about={"source": config.base.vqvae})
    torch.manual_seed(config.seed)
    vqvae = VQVAE(config.vqvae).to(experiment.device)
    objective = VQVAEObjective(vqvae, training, held_out, config.train_vqvae)
    metrics = train(objective, config.train_vqvae, experiment.training_run("train_vqvae"))
    loaded.save(experiment, "train_vqvae", vqvae)
    return StageResult(metrics, about={"checkpoint": "checkpoint"})


def reads(config: Config, ours: Config) -> Keys:
    trained = ("train_vqvae",) if config.base.vqvae is None else ()
    return ("seed", "dtype", "data", "vqvae", "base.vqvae", *trained)


def refuse(config: Config) -> None:
    if config.base.vqvae is None and launched_processes() > 1:
        raise ConfigError(
            f"train_vqvae trains in one process, torchrun started {launched_processes()}: run it "
            "by itself first, or give base.vqvae"
        )


STAGE = Stage("train_vqvae", run, reads, given="base.vqvae", refuse=refuse, reads_pictures=True)
