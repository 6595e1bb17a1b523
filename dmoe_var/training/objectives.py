"""Define the objectives of the token-level stages: base VAR and sparse fine-tuning.

Legend: B batch, L tokens of all scales, V vocabulary, H neurons of an FFN.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dmoe_var.config_fields import STRICT, PathOrName, Scales, Several, Share
from dmoe_var.conversion.hoyer import ActivationProbe, hoyer, shifted_pre_activation
from dmoe_var.data.image_sets import evenly_strided
from dmoe_var.data.token_cache import TokenSet
from dmoe_var.distributed import rank, world_size
from dmoe_var.models.blocks import Rows
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.training.distillation import Join, alone, divergence, prediction_loss
from dmoe_var.training.step import OptimConfig, summed

VALIDATION_BATCH = 128
"""Held-out images per batch, if `micro_batch_size` does not say how many fit."""


class TokenObjective:
    """What the token-level objectives share: batches of tokens, teacher inputs, validation."""

    repeatable = True
    most_validated = sys.maxsize
    """Most held-out images in a validation, spread evenly over the set."""

    def __init__(
        self, var: VAR, vqvae: VQVAE, training: TokenSet, held_out: TokenSet, config: OptimConfig
    ):
        self.module: nn.Module = var
        self.var = var
        self.vqvae = vqvae
        self.training = training
        self.held_out = held_out
        self.config = config
        self.num_examples = len(training)
        self.device = var.pos_start.device
        self.validation_batch = config.micro_batch_size or VALIDATION_BATCH
        self.learnt_tokens: Tensor | slice = slice(None)
        self.dense: VAR | None = None
        self.distill = 0.0
        self.join: Join = alone

    def learn_from(self, dense: VAR | None, distill: float) -> None:
        """Take this share of the loss against a dense model's predictions; 0 needs no model."""
        if distill and dense is None:
            raise ValueError(f"distill={distill} needs the dense model")
        self.distill = distill
        self.dense = dense.requires_grad_(False).eval() if distill and dense else None

    def batch(self, tokens: TokenSet, indices_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, L), labels (B,) and teacher input (B, L - 1, Cvae)."""
        with torch.autocast(self.device.type, enabled=False):  # as in validation and sampling
            return tokens.teacher_forced(indices_B, self.vqvae)

    def with_null(self, labels_B: Tensor, rows: Rows, share: float) -> Tensor:
        """Give the first rows of a whole batch the null class: this share of them."""
        is_null_B = rows.start + torch.arange(len(labels_B), device=self.device) < round(
            share * rows.total
        )
        return torch.where(is_null_B, self.var.config.num_classes, labels_B)

    def held_out_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the held-out images that are validated, in order; every process gets its share of
        the batches."""
        batches = evenly_strided(len(self.held_out), self.most_validated).split(
            self.validation_batch
        )
        for indices_B in batches[rank() :: world_size()]:
            yield self.batch(self.held_out, indices_B)

    def prediction_loss(
        self, logits_BLV: Tensor, tokens_BL: Tensor, labels_B: Tensor, teacher_BLC: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Measure how well the learnt tokens are predicted, and what is logged of it: against the
        tokens and, if there is a dense model to learn from, against its predictions."""
        dense_BlV = self._dense_logits(labels_B, teacher_BLC)
        learnt = self.learnt_tokens
        given = (logits_BLV[:, learnt], tokens_BL[:, learnt], dense_BlV, self.distill)
        return prediction_loss(*given, self.join)

    def add_divergence(
        self, mean: Mean, logits_BLV: Tensor, labels_B: Tensor, teacher_BLC: Tensor
    ) -> None:
        """Add to `mean` how far learnt tokens are from a dense model that is learnt from."""
        dense_BlV = self._dense_logits(labels_B, teacher_BLC)
        if dense_BlV is not None:
            learnt = self.join(logits_BLV[:, self.learnt_tokens])
            kl = divergence(learnt, self.join(dense_BlV))
            mean.add("val_kl", kl, len(logits_BLV))

    @torch.no_grad()
    def _dense_logits(self, labels_B: Tensor, teacher_BLC: Tensor) -> Tensor | None:
        """Predict the learnt tokens by the dense model, for labels that were checked."""
        if self.dense is None:
            return None
        return self.dense.predict(labels_B, teacher_BLC)[:, self.learnt_tokens]

    def after_step(self, step: int, num_steps: int) -> None:
        """Do nothing between steps."""


class Mean:
    """Running means by name, weighted by a count, over all processes."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._weights: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        self._sums[name] += float(value) * weight
        self._weights[name] += weight

    def result(self) -> dict[str, float]:
        """Return the means; every process has to ask for them."""
        sums, weights = summed(self._sums), summed(self._weights)
        return {name: total / weights[name] for name, total in sums.items()}


@dataclass(frozen=True)
class TokenTrainingConfig(OptimConfig):
    """Training of a VAR on tokens."""

    activation_checkpointing: bool = False
    """Whether blocks run again in the backward pass, to store less for a third more work."""


@dataclass(frozen=True)
class VARTrainingConfig(TokenTrainingConfig):
    """Training of the dense VAR."""

    start: PathOrName | None = None
    """Weights that training begins with: a source as base.var, of which later stages ask the
    content too; null draws new ones."""
    snapshot_every: Annotated[int, Field(gt=0)] | None = None
    """Steps from one model that is kept in snapshots/ to the next; null keeps none."""
    scale_weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Several] | None = None
    """Weights in the loss of each scale's tokens; only ratios count. null weights all tokens
    alike."""


class VARObjective(TokenObjective):
    """Cross-entropy of the next scale's tokens, each token weighted 1 / L unless their scales are
    weighted (base training)."""

    config: TokenTrainingConfig
    weights_L: Tensor | None = None
    """Weights of the tokens, with mean 1; None is 1 for all."""

    def weight_scales(self, weights_S: Sequence[float] | None) -> None:
        """Weight the loss of each scale's tokens (see `VARTrainingConfig.scale_weights`)."""
        if weights_S is None:
            return
        sizes_S = [scale.stop - scale.start for scale in self.var.config.scale_slices]
        weights_L = np.repeat(np.array(weights_S) / max(weights_S), sizes_S)
        self.weights_L = torch.from_numpy(weights_L / weights_L.mean()).to(
            self.device, torch.float32
        )

    def loss(
        self, indices_B: Tensor, step: int, num_steps: int, rows: Rows
    ) -> tuple[Tensor, dict[str, float]]:
        tokens_BL, labels_B, teacher_BLC = self.batch(self.training, indices_B)
        labels_B = self.var.drop_labels(labels_B, rows)
        checkpointing = self.config.activation_checkpointing
        logits_BLV = self.var.predict(labels_B, teacher_BLC, rows, checkpointing)
        if self.weights_L is None:
            return self.prediction_loss(logits_BLV, tokens_BL, labels_B, teacher_BLC)
        loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")
        return (self.weights_L * loss_BL).mean(), {}

    def validate(self) -> dict[str, float]:
        """Measure cross-entropy and accuracy on held-out images, over all tokens and by scale."""
        mean = Mean()
        for tokens_BL, labels_B, teacher_BLC in self.held_out_batches():
            logits_BLV = self.var(labels_B, teacher_BLC)
            loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")
            hit_BL = (logits_BLV.argmax(-1) == tokens_BL).float()
            rows = len(tokens_BL)
            mean.add("val_ce", loss_BL.mean(), rows)
            mean.add("val_accuracy", hit_BL.mean(), rows)
            self.add_divergence(mean, logits_BLV, labels_B, teacher_BLC)
            for si, scale in enumerate(self.var.config.scale_slices):
                mean.add(f"val_ce_scale{si}", loss_BL[:, scale].mean(), rows)
                mean.add(f"val_accuracy_scale{si}", hit_BL[:, scale].mean(), rows)
        return mean.result()


@dataclass(frozen=True)
class ConversionConfig:
    """What sparse fine-tuning changes in the model, and for which scales."""

    __pydantic_config__ = STRICT

    train: Literal["blocks+head", "ffn"] = "blocks+head"
    """blocks+head as in the paper, or ffn: the dynamic model then shares all else with the
    dense one."""
    scales: Literal["all", "last3"] | Scales = "all"
    """Scales whose tokens enter the loss: all as in the paper, last3, or a list."""

    def scale_numbers(self, num_scales: int) -> tuple[int, ...]:
        """List the scales whose tokens enter the loss."""
        every = tuple(range(num_scales))
        if self.scales == "all":
            return every
        return every[-3:] if self.scales == "last3" else tuple(self.scales)


@dataclass(frozen=True)
class SparsifyConfig(TokenTrainingConfig):
    """Sparse fine-tuning (DMoE-VAR, Eq. 1): CE + alpha * Hoyer."""

    alpha: Annotated[float, Field(ge=0)] = 1e-4
    """Weight of the Hoyer loss."""
    alpha_warmup: Share = 0.0
    """Share of the steps over which alpha rises from 0."""
    activation: Literal["relu", "gelu"] = "relu"
    """relu, or gelu: the ablation without ReLUfication, Hoyer on clamped and shifted
    pre-activations."""
    distill: Share = 0.0
    """Share of the cross-entropy that gives way to the divergence from the dense model's
    predictions (beyond the paper)."""

    def alpha_at(self, step: int, num_steps: int) -> float:
        """Return alpha of step 0..num_steps - 1."""
        warmup = self.alpha_warmup * num_steps
        return self.alpha * min(1.0, (step + 1) / warmup) if warmup else self.alpha


def select_trainable(var: VAR, what: str) -> None:
    """Set requires_grad for `ConversionConfig.train`."""
    for name, parameter in var.named_parameters():
        in_blocks_or_head = name.startswith(("blocks.", "head"))
        parameter.requires_grad_(".ffn." in name if what == "ffn" else in_blocks_or_head)


def tokens_of(config: VARConfig, scales: Sequence[int], device: torch.device) -> Tensor | slice:
    """Index the tokens of some scales among all L. The index is on the device of what it indexes:
    one from the CPU would be copied there, and waited for, each time."""
    if len(scales) == config.num_scales:
        return slice(None)
    slices = [config.scale_slices[si] for si in scales]
    return torch.cat([torch.arange(t.start, t.stop, device=device) for t in slices])


class SparsifyObjective(VARObjective):
    """The prediction's loss plus alpha times the mean over layers of the FFN activations' Hoyer
    measure."""

    config: SparsifyConfig

    def __init__(
        self,
        var: VAR,
        vqvae: VQVAE,
        training: TokenSet,
        held_out: TokenSet,
        config: SparsifyConfig,
        conversion: ConversionConfig,
        dense: VAR | None = None,
    ):
        super().__init__(var, vqvae, training, held_out, config)
        self.learn_from(dense, config.distill)
        learnt = conversion.scale_numbers(var.config.num_scales)
        self.learnt_tokens = tokens_of(var.config, learnt, self.device)
        self.probe = ActivationProbe(var, pre_activation=config.activation == "gelu")
        select_trainable(var, conversion.train)

    def _hoyer(self, a_BLH: Tensor) -> Tensor:
        a_BlH = a_BLH[:, self.learnt_tokens]
        return hoyer(shifted_pre_activation(a_BlH) if self.probe.pre_activation else a_BlH)

    def loss(
        self, indices_B: Tensor, step: int, num_steps: int, rows: Rows
    ) -> tuple[Tensor, dict[str, float]]:
        by_layer: dict[int, Tensor] = {}
        # The first time counts: checkpointed blocks are seen once more in the backward pass.
        self.probe.see = lambda layer, a_BLH: by_layer.setdefault(layer, self._hoyer(a_BLH))
        prediction, logged = super().loss(indices_B, step, num_steps, rows)
        sparsity = torch.stack([by_layer[layer] for layer in sorted(by_layer)]).mean()
        alpha = self.config.alpha_at(step, num_steps)
        logged = logged or {"ce": prediction.item()}
        loss = prediction + alpha * sparsity
        return loss, {**logged, "hoyer": sparsity.item(), "alpha": alpha}

    def validate(self) -> dict[str, float]:
        """Measure as for VAR, and the share of inactive neurons by layer and scale, and the Hoyer
        measure. Only the last is limited to the tokens that enter the loss."""
        mean = Mean()

        def see(layer: int, a_BLH: Tensor) -> None:
            rows, inactive_BLH = len(a_BLH), (a_BLH <= 0).float()
            mean.add("val_hoyer", self._hoyer(a_BLH), rows)
            mean.add("val_inactive", inactive_BLH.mean(), rows)
            for si, scale in enumerate(self.var.config.scale_slices):
                share = inactive_BLH[:, scale].mean()
                mean.add(f"val_inactive_layer{layer}_scale{si}", share, rows)

        self.probe.see = see
        scores = super().validate()
        self.probe.see = None
        return {**mean.result(), **scores}
