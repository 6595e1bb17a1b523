"""Beside the stages: train the classifier of pictures that `evaluate` compares labels with
(`fidelity.classifier=resnet`), or validate the given one (`base.classifier`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from dmoe_var.config.root import Config
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.models.classifier import ResNetClassifier
from dmoe_var.stages.parts import loaded
from dmoe_var.training.classifier_objective import ClassifierObjective, ClassifierTrainingConfig
from dmoe_var.training.loop import train


def run(experiment: Experiment) -> StageResult:
    config = experiment.config
    once = replace(config.data, augmentations=1, flip=False)  # the objective augments by itself
    training, held_out = loaded.image_sets(experiment, once)
    if config.base.classifier is not None:
        network = loaded.classifier(experiment)
        untrained = ClassifierTrainingConfig()  # without effect on what is validated
        objective = ClassifierObjective(network, training, held_out, untrained)
        with torch.no_grad():
            return StageResult(objective.validate(), about={"source": config.base.classifier})
    torch.manual_seed(config.seed)
    network = ResNetClassifier(loaded.classifier_config(experiment)).to(experiment.device)
    objective = ClassifierObjective(network, training, held_out, config.train_classifier)
    run = experiment.training_run("train_classifier")
    metrics = train(objective, config.train_classifier, run)
    loaded.save(experiment, "train_classifier", network)
    return StageResult(metrics, about={"checkpoint": "checkpoint"})


def look(experiment: Experiment) -> None:
    """Raise CheckpointError if the classifier that is given does not fit."""
    if experiment.config.base.classifier is not None:
        loaded.classifier(experiment)


def reads(config: Config, ours: Config) -> Keys:
    trained = ("train_classifier",) if config.base.classifier is None else ()
    return ("seed", "dtype", "data", "var.num_classes", "base.classifier", *trained)


STAGE = Stage(
    "train_classifier",
    run,
    reads,
    given="base.classifier",
    look=look,
    one_process=True,
    reads_pictures=True,
)
