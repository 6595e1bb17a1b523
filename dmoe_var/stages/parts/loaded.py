"""Load strictly the models that stages hand to each other, checked against the configuration.

They are float32 whatever precision their files hold: images are coded and models are trained so.
A stage that samples in another precision (`sampling.dtype`) casts them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch

from dmoe_var.checkpoints import load_var, load_vqvae
from dmoe_var.checkpoints.load import load_classifier
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.config.root import Config
from dmoe_var.data import load_data
from dmoe_var.data.config import DataConfig
from dmoe_var.data.images import Images
from dmoe_var.data.token_cache import Seconds, TokenSet, tokenize
from dmoe_var.distributed import is_main
from dmoe_var.errors import CheckpointError, ConfigError
from dmoe_var.experiment.contents import contents_of_files, naming
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Keys
from dmoe_var.models.build import build_strictly
from dmoe_var.models.classifier import ClassifierConfig, ResNetClassifier
from dmoe_var.models.collaborative_var import IN_COMMON, AnyVAR, CollaborativeVAR
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.layer import ExpertConfig
from dmoe_var.moe.router import default_hidden

T = TypeVar("T")

EXPERTS = ("moe", "selection")
"""Sections that say nothing about a dense model."""

MADE_OF_EXPERTS = ("split", "train_router", "tune_experts")
"""Stages that leave a VAR with experts: untrained routers, trained ones, and both tuned."""

TRAINING_ONLY = ("drop_path", "label_drop", "adaln_gamma_gain")
"""Fields that shape training, not the function: published files do not hold them."""


def drafter_keys(config: Config) -> Keys:
    """Name the keys of the drafter: without one, the number of its scales says nothing."""
    return ("drafter",) if config.drafter.var is not None else ("drafter.var",)


def check_drafter(config: Config) -> None:
    """Raise ConfigError for a drafter that leaves no scale to experts."""
    if config.drafter.scales == config.var.num_scales:
        raise ConfigError(
            f"drafter.scales={config.drafter.scales} leaves no scale to the experts; allowed with "
            f"them: 0..{config.var.num_scales - 1}"
        )


def refuse_drafter(config: Config, why: str) -> None:
    """Raise ConfigError for a drafter in a stage that knows only the refiner."""
    if config.drafter.var is not None:
        raise ConfigError(f"drafter.var={config.drafter.var}: {why}; allowed here: null")


def checkpoint(experiment: Experiment, stage: str) -> Path:
    return experiment.folder(stage) / "checkpoint"


def save(experiment: Experiment, stage: str, model: VAR | VQVAE | ResNetClassifier) -> None:
    """Write a stage's checkpoint, by the main process, with the fingerprint it belongs to."""
    if is_main():
        fingerprint, max_mb = experiment.fingerprint(stage), experiment.config.max_file_mb
        save_checkpoint(checkpoint(experiment, stage), model, fingerprint, max_mb)


def vqvae(experiment: Experiment) -> VQVAE:
    """Load the VQ-VAE of an experiment, in eval mode on the experiment's device."""
    given = experiment.config.base.vqvae
    source = given if given is not None else checkpoint(experiment, "train_vqvae")
    with naming("base.vqvae", given):
        model = load_vqvae(source, experiment.config.vqvae.patch_nums)
        check_shape(str(source), model.config, experiment.config.vqvae, ("beta",))
    return model.to(experiment.device, torch.float32).requires_grad_(False)


def dense(experiment: Experiment) -> VAR:
    """Load the base VAR, in eval mode on the experiment's device."""
    return var(experiment, "train_var")


def sparse(experiment: Experiment) -> VAR:
    """Load the fine-tuned VAR, before it is split."""
    return var(experiment, "sparsify")


def needs_experts(config: Config) -> Keys:
    """Name the stage that the experts in use come from, for the `needs` of stages."""
    return (config.expert_stage,)


def split(experiment: Experiment, stage: str | None = None, key: str | None = None) -> VAR:
    """Load the expert VAR as a stage left it: one of MADE_OF_EXPERTS, or by default the last one
    that the configuration has. The whole one says which: a stage's `needs` do too. `key` may give
    another of its shape."""
    return var(experiment, stage or experiment.whole.expert_stage, key)


def var(experiment: Experiment, stage: str, key: str | None = None) -> VAR:
    """Load the VAR as a stage left it, in eval mode on the experiment's device. The stage is
    train_var, sparsify, or one of MADE_OF_EXPERTS. `key` may give another of its shape, as base.var
    does for train_var."""
    key = "base.var" if stage == "train_var" else key
    given = None if key is None else attrgetter(key)(experiment.config)
    source, expected = given or checkpoint(experiment, stage), experiment.config.var
    if stage != "train_var":
        expected = replace(expected, activation=experiment.config.sparsify.activation)
    if stage in MADE_OF_EXPERTS:
        hidden = experiment.config.split.router_hidden or default_hidden(expected.C)
        told = "none" if stage == "split" else experiment.config.train_router.condition
        experts = ExpertConfig(experiment.config.split.expert_size, hidden, told)
        expected = replace(expected, experts=experts)
    with naming(key, given):
        model = load_var(source)
        config = model.config
        if config.experts is not None and config.experts.router_hidden is None:
            experts = replace(config.experts, router_hidden=default_hidden(config.C))
            config = replace(config, experts=experts)
        check_shape(str(source), config, expected, TRAINING_ONLY)
        configured = build_strictly(lambda: VAR(expected), model.state_dict(), source)
    return configured.to(experiment.device, torch.float32)


def classifier_config(experiment: Experiment) -> ClassifierConfig:
    """Say which shape `train_classifier` trains."""
    shape = experiment.config.train_classifier
    return ClassifierConfig(experiment.config.var.num_classes, shape.width, shape.blocks)


def classifier(experiment: Experiment) -> ResNetClassifier:
    """Load the classifier of pictures, in eval mode on the experiment's device. One that is given
    may have any shape."""
    given = experiment.config.base.classifier
    source = given or checkpoint(experiment, "train_classifier")
    with naming("base.classifier", given):
        network = load_classifier(source)
        if given is None:
            check_shape(str(source), network.config, classifier_config(experiment), ())
        elif network.config.num_classes != experiment.config.var.num_classes:
            raise CheckpointError(
                f"{source}: a classifier of {network.config.num_classes} classes; expected "
                f"var.num_classes={experiment.config.var.num_classes}"
            )
    return network.to(experiment.device, torch.float32).requires_grad_(False)


def dynamic(experiment: Experiment) -> DynamicVAR:
    """Load the dense and the expert VAR, joined at `moe.scales`."""
    return DynamicVAR(dense(experiment), split(experiment), experiment.config.moe.scales)


def drafter(experiment: Experiment) -> VAR:
    """Load the drafter, in eval mode on the experiment's device. Raise CheckpointError if it is not
    dense, or of another tokenizer or other classes than the configuration."""
    source, expected = experiment.config.drafter.var, experiment.config.var
    assert source is not None
    with naming("drafter.var", source):
        model = load_var(source)
        free = tuple(name for name in vars(model.config) if name not in ("experts", *IN_COMMON))
        check_shape(source, model.config, expected, free)
    return model.to(experiment.device, torch.float32)


def drafted(config: Config, refiner: VAR | DynamicVAR, by: VAR | None) -> AnyVAR:
    """Put a drafter, if there is one, before a model."""
    if by is None or config.drafter.scales is None:
        return refiner
    if isinstance(refiner, DynamicVAR):
        check_drafter(config)
    return CollaborativeVAR(by, refiner, config.drafter.scales)


def refuse_int8(config: Config, why: str) -> None:
    """Raise ConfigError for 8 bits in a stage that knows only floats."""
    if config.sampling.int8 != "none":
        raise ConfigError(f"sampling.int8={config.sampling.int8}: {why}; allowed here: none")


@dataclass(frozen=True)
class Models:
    """Models that the points of a sweep or a figure share. Each is looked up by a point's own
    configuration and loaded once. The latest of each kind is kept, in the dtype of sampling."""

    experiment: Experiment
    """The work whose models `vqvae`, `dense` and `experts` are."""
    _latest: dict[Hashable, tuple[object, Any]] = field(
        default_factory=dict, init=False, repr=False
    )
    """By kind: what the model was made of, and the model."""

    @property
    def vqvae(self) -> VQVAE:
        return self.vqvae_of(self.experiment)

    @property
    def dense(self) -> VAR:
        return self.var_of(self.experiment, "train_var")

    @property
    def experts(self) -> VAR:
        return self.var_of(self.experiment, self.experiment.whole.expert_stage)

    def vqvae_of(self, experiment: Experiment) -> VQVAE:
        """Load the VQ-VAE of a point, or reuse the latest."""
        dtype = experiment.config.sampling.torch_dtype
        key = (experiment.fingerprint_of_model("train_vqvae"), dtype)
        return self.made("vqvae", key, lambda: vqvae(experiment).to(dtype))

    def var_of(self, experiment: Experiment, stage: str) -> VAR:
        """Load or reuse a point's VAR as a stage left it: dense, sparse, or split into experts."""
        dtype = experiment.config.sampling.torch_dtype
        kind = "experts" if stage in MADE_OF_EXPERTS else stage
        key = (stage, experiment.fingerprint_of_model(stage), dtype)
        return self.made(kind, key, lambda: var(experiment, stage).to(dtype))

    def drafted(self, experiment: Experiment, refiner: VAR | DynamicVAR) -> AnyVAR:
        """Put a point's drafter, if it has one, before its model. Load it, or reuse the latest."""
        config = experiment.config
        if config.drafter.var is None:
            return refiner
        dtype = config.sampling.torch_dtype
        key = (tuple(contents_of_files("drafter.var", config.drafter.var).items()), dtype)
        by = self.made("drafter", key, lambda: drafter(experiment).to(dtype))
        return drafted(config, refiner, by)

    def made(self, kind: Hashable, key: object, make: Callable[[], T]) -> T:
        """Reuse the latest of a kind if it has the same key, else make a new one in its place."""
        if kind not in self._latest or self._latest[kind][0] != key:
            self._latest.pop(kind, None)  # frees memory for the new one
            self._latest[kind] = (key, make())
        made: T = self._latest[kind][1]
        return made


def check_shape(source: str, found: object, expected: object, free: tuple[str, ...]) -> None:
    """Raise CheckpointError for a model whose shape is not the configured one, but for some
    fields."""
    differs = [
        f"{name} is {value}, the configuration says {getattr(expected, name)}"
        for name, value in vars(found).items()
        if name not in free and value != getattr(expected, name)
    ]
    if differs:
        raise CheckpointError(f"{source}: belongs to another configuration: {'; '.join(differs)}")


def image_sets(experiment: Experiment, data: DataConfig | None = None) -> tuple[Images, Images]:
    """Load training and held-out images (`data`: others than configured), labelled for the
    configured VAR. Raise DataError if they cannot be."""
    return load_data(
        data or experiment.config.data,
        experiment.config.var.num_classes,
        hashes=experiment.cache / "hashes",
        progress=experiment.progress,
    )


def token_sets(experiment: Experiment, vqvae: VQVAE) -> tuple[TokenSet, TokenSet]:
    """Tokenize training and held-out images. Raise DataError if the VAR has other classes."""
    config = experiment.config
    tokens = [
        tokenize(
            images,
            vqvae,
            experiment.cache / "tokens",
            batch_size=config.data.encode_batch,
            workers=config.data.workers,
            unreadable=config.data.unreadable,
            progress=config.progress,
        )
        for images in image_sets(experiment)
    ]
    return tokens[0], tokens[1]


def token_metrics(sets: Sequence[TokenSet]) -> dict[str, float]:
    """Count images with tokens and pictures left out as unreadable. Images per second are those of
    decoders and of encoder alone, in one process, when the sets were made (see `Seconds`)."""
    images = sum(tokens.about.images for tokens in sets)
    seconds = sum((tokens.about.seconds for tokens in sets), Seconds())
    return {
        "tokens_images": images,
        "tokens_unreadable": sum(tokens.about.unreadable for tokens in sets),
        "tokens_decode_images_per_s": images / seconds.decode,
        "tokens_encode_images_per_s": images / seconds.encode,
    }


def token_about(sets: Sequence[TokenSet]) -> dict[str, Any]:
    """Tell a record which images the training and held-out tokens were made of."""
    training, held_out = (dict(tokens.about.data) for tokens in sets)
    held_out.pop("classes", None)  # the same as training's
    return {"data": {"training": training, "held_out": held_out}}
