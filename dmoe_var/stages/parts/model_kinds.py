"""Define the kinds of model that a point of a quality-cost curve can have. The class of a kind
knows what the model reads and is made of, how it is loaded and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dmoe_var.config.root import Config
from dmoe_var.conversion.pruning import kept_neurons, mean_activations, prune
from dmoe_var.distributed import rank, world_size
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Keys
from dmoe_var.files import write_text
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.var import VAR
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import EXPERTS, Models, token_sets
from dmoe_var.stages.parts.skipped_means import let_means_stand

PRUNING_FILE = "pruning.json"
IMAGES_AT_ONCE = 16
"""Training images whose activations are in memory together."""


class Dense:
    """The base VAR."""

    reads: Keys = ()

    def needs(self, config: Config) -> Keys:
        """Name the stage that its own weights come from."""
        return ("train_var",)

    def load(self, models: Models, experiment: Experiment) -> VAR | DynamicVAR:
        """Load the model of a point. All processes call it at once."""
        return models.var_of(experiment, "train_var")

    def sampled_by(self, config: Config) -> dict[str, Any]:
        """Say how experts run as images are sampled: `selection` and `impl` of a Drawing."""
        return {"selection": None}

    def about(self, models: Models, experiment: Experiment) -> dict[str, Any]:
        """Tell what the record of a point adds once its images are sampled."""
        return {}

    def text(self, config: Config) -> str:
        """Describe the model in a few words."""
        return "dense"


class Dynamic(Dense):
    """The base VAR with experts at `moe.scales` under `selection`."""

    reads = EXPERTS

    def needs(self, config: Config) -> Keys:
        untrained = not config.selection.kind.needs_router and not config.tune_experts.on
        return ("split",) if untrained else (config.expert_stage,)

    def load(self, models: Models, experiment: Experiment) -> DynamicVAR:
        dense = models.var_of(experiment, "train_var")
        (stage,) = self.needs(experiment.whole)
        model = DynamicVAR(dense, models.var_of(experiment, stage), experiment.config.moe.scales)
        vqvae, selection = models.vqvae_of(experiment), experiment.config.selection.rules()
        let_means_stand(models, experiment, model, vqvae, selection)
        return model

    def sampled_by(self, config: Config) -> dict[str, Any]:
        return {"selection": config.selection.rules(), "impl": config.moe.impl}

    def about(self, models: Models, experiment: Experiment) -> dict[str, Any]:
        config = experiment.config
        return {} if config.moe.skipped == "zero" else {"means_of": config.selection.text}

    def text(self, config: Config) -> str:
        means = "" if config.moe.skipped == "zero" else " with means"
        return f"{config.selection.text}{means} at scales {_scales(config)}"


class Pruned(Dense):
    """The base VAR with FFNs at `moe.scales` that `pruning` made narrower."""

    reads = ("moe.scales", "pruning")

    def needs(self, config: Config) -> Keys:
        return ("sparsify",) if config.pruning.model == "sparse" else ("train_var",)

    def load(self, models: Models, experiment: Experiment) -> DynamicVAR:
        dense = models.var_of(experiment, "train_var")
        return DynamicVAR(dense, self.pruned(models, experiment)[0], experiment.config.moe.scales)

    def about(self, models: Models, experiment: Experiment) -> dict[str, Any]:
        """Write pruning.json beside the record: the neurons that stay, by layer."""
        _, kept = self.pruned(models, experiment)  # made when the images were sampled
        content = {"hidden": experiment.config.var.hidden, "kept": kept}
        write_text(experiment.folder("evaluate") / PRUNING_FILE, json.dumps(content) + "\n")
        return {"pruning": PRUNING_FILE, "kept_neurons": len(kept[0])}

    def text(self, config: Config) -> str:
        pruning = config.pruning
        how = f"{pruning.model} pruned by {pruning.share:g} ({pruning.rule})"
        return f"{how} at scales {_scales(config)}"

    def pruned(self, models: Models, experiment: Experiment) -> tuple[VAR, list[list[int]]]:
        """Prune the VAR of a point, or reuse the latest; also return the neurons that each layer
        kept, rising. All processes call it at once."""
        pruning, scales = experiment.config.pruning, experiment.config.moe.scales
        (stage,) = self.needs(experiment.config)
        of_means = (pruning.rule, pruning.images, scales, experiment.config.sampling.torch_dtype)
        key = (stage, experiment.fingerprint_of_model(stage), *of_means)
        var = models.var_of(experiment, stage)
        means = models.made(("means", *key), key, lambda: _mean_activations(experiment, var))

        def make() -> tuple[VAR, list[list[int]]]:
            kept = [kept_neurons(means_H, pruning.share).tolist() for means_H in means]
            return prune(var, pruning.share, means), kept

        return models.made("pruned", (*key, pruning.share), make)


KINDS: dict[str, Dense] = {"dense": Dense(), "dynamic": Dynamic(), "pruned": Pruned()}
"""The kinds by the value of `evaluate.model`."""


def kind_of(config: Config) -> Dense:
    return KINDS[config.evaluate.model]


def _scales(config: Config) -> str:
    return ",".join(map(str, config.moe.scales))


def _mean_activations(experiment: Experiment, var: VAR) -> list[Tensor]:
    """Average over training images spread evenly over the set, which may be sorted by class."""
    vqvae, pruning = loaded.vqvae(experiment), experiment.config.pruning
    tokens, _ = token_sets(experiment, vqvae)
    num_images = min(pruning.images, len(tokens))
    indices = torch.arange(num_images) * len(tokens) // num_images
    batches = indices.split(IMAGES_AT_ONCE)[rank() :: world_size()]

    def inputs() -> Iterator[tuple[Tensor, Tensor]]:
        for indices_B in batches:
            tokens_BL, labels_B = tokens.batch(indices_B)
            teacher = vqvae.teacher_input(tokens.by_scale(tokens_BL.to(experiment.device)))
            yield labels_B.to(experiment.device), teacher

    return mean_activations(
        var, inputs(), experiment.config.moe.scales, pruning.rule == "mean_signed"
    )
