"""Objectives of the token-level stages: base VAR and sparse fine-tuning.

Legend: B batch, L tokens of all scales, V vocabulary, H neurons of an FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dmoe_var.conversion.hoyer import (
    hoyer_loss,
    inactive_share,
    record_activations,
    shifted_pre_activation,
)
from dmoe_var.data.token_cache import TokenSet
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.training.loop import OptimConfig

VALIDATION_BATCH = 128


class TokenObjective:
    """What the token-level objectives share: batches of tokens, teacher inputs, validation."""

    def __init__(self, var: VAR, vqvae: VQVAE, training: TokenSet, held_out: TokenSet):
        self.module: nn.Module = var
        self.var = var
        self.vqvae = vqvae
        self.training = training
        self.held_out = held_out
        self.num_examples = len(training)
        self.device = var.pos_start.device

    def batch(self, tokens: TokenSet, indices_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, L), labels (B,), teacher input (B, L - 1, Cvae)."""
        tokens_BL, labels_B = tokens.batch(indices_B)
        tokens_BL, labels_B = tokens_BL.to(self.device), labels_B.to(self.device)
        teacher_BLC = self.vqvae.teacher_input(tokens.by_scale(tokens_BL))
        return tokens_BL, labels_B, teacher_BLC

    def held_out_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All held-out images in order."""
        for indices_B in torch.arange(len(self.held_out)).split(VALIDATION_BATCH):
            yield self.batch(self.held_out, indices_B)

    def after_step(self, step: int, num_steps: int) -> None:
        """Nothing to do between steps."""


class Mean:
    """Running means by name, weighted by a count."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value) * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def result(self) -> dict[str, float]:
        return {name: total / self._weights[name] for name, total in self._sums.items()}


class VARObjective(TokenObjective):
    """Cross-entropy of the next scale's tokens, each token weighted 1 / L (base training)."""

    def loss(self, indices_B: Tensor, step: int, num_steps: int) -> tuple[Tensor, dict[str, float]]:
        tokens_BL, labels_B, teacher_BLC = self.batch(self.training, indices_B)
        logits_BLV = self.var(labels_B, teacher_BLC)
        return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten()), {}

    def validate(self) -> dict[str, float]:
        """Cross-entropy and accuracy on held-out images, over all tokens and by scale."""
        mean = Mean()
        for tokens_BL, labels_B, teacher_BLC in self.held_out_batches():
            logits_BLV = self.var(labels_B, teacher_BLC)
            self._add_scores(mean, logits_BLV, tokens_BL)
        return mean.result()

    def _add_scores(self, mean: Mean, logits_BLV: Tensor, tokens_BL: Tensor) -> None:
        loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")
        hit_BL = (logits_BLV.argmax(-1) == tokens_BL).float()
        rows = len(tokens_BL)
        mean.add("val_ce", loss_BL.mean(), rows)
        mean.add("val_accuracy", hit_BL.mean(), rows)
        for si, scale in enumerate(self.var.config.scale_slices):
            mean.add(f"val_ce_scale{si}", loss_BL[:, scale].mean(), rows)
            mean.add(f"val_accuracy_scale{si}", hit_BL[:, scale].mean(), rows)


@dataclass(frozen=True)
class SparsifyConfig(OptimConfig):
    """Sparse fine-tuning (DMoE-VAR, Eq. 1): CE + alpha * Hoyer.

    train: what trains; "blocks+head" as in the paper, "ffn" the FFNs alone, "all" everything.
    alpha rises linearly from 0 over `alpha_warmup` (a share of all steps). activation "gelu" is the
    ablation without ReLUfication: Hoyer on clamped and shifted pre-activations.
    """

    alpha: Annotated[float, Field(ge=0)] = 1e-4
    alpha_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    activation: Literal["relu", "gelu"] = "relu"
    train: Literal["blocks+head", "ffn", "all"] = "blocks+head"

    def alpha_at(self, step: int, num_steps: int) -> float:
        """alpha of step 0..num_steps - 1."""
        warmup = self.alpha_warmup * num_steps
        return self.alpha * min(1.0, (step + 1) / warmup) if warmup else self.alpha


def select_trainable(var: VAR, what: str) -> None:
    """Set requires_grad for `SparsifyConfig.train`."""
    prefixes = {"blocks+head": ("blocks.", "head"), "all": ("",)}
    for name, parameter in var.named_parameters():
        if what == "ffn":
            parameter.requires_grad_(".ffn." in name)
        else:
            parameter.requires_grad_(name.startswith(prefixes[what]))


class SparsifyObjective(VARObjective):
    """Cross-entropy plus alpha times the Hoyer measure of the FFN activations."""

    def __init__(
        self,
        var: VAR,
        vqvae: VQVAE,
        training: TokenSet,
        held_out: TokenSet,
        config: SparsifyConfig,
    ):
        super().__init__(var, vqvae, training, held_out)
        self.config = config
        self.pre_activation = config.activation == "gelu"
        select_trainable(var, config.train)

    def _sparsity(self, activations: list[Tensor]) -> Tensor:
        if self.pre_activation:
            activations = [shifted_pre_activation(z_BLH) for z_BLH in activations]
        return hoyer_loss(activations)

    def loss(self, indices_B: Tensor, step: int, num_steps: int) -> tuple[Tensor, dict[str, float]]:
        with record_activations(self.var, self.pre_activation) as activations:
            cross_entropy, _ = super().loss(indices_B, step, num_steps)
        sparsity = self._sparsity(activations)
        alpha = self.config.alpha_at(step, num_steps)
        logged = {"ce": cross_entropy.item(), "hoyer": sparsity.item(), "alpha": alpha}
        return cross_entropy + alpha * sparsity, logged

    def validate(self) -> dict[str, float]:
        """As for VAR, with the Hoyer measure and the share of inactive neurons by layer and
        scale."""
        mean = Mean()
        for tokens_BL, labels_B, teacher_BLC in self.held_out_batches():
            with record_activations(self.var, self.pre_activation) as activations:
                logits_BLV = self.var(labels_B, teacher_BLC)
            self._add_scores(mean, logits_BLV, tokens_BL)
            rows = len(tokens_BL)
            mean.add("val_hoyer", self._sparsity(activations), rows)
            for layer, a_BLH in enumerate(activations):
                mean.add("val_inactive", inactive_share(a_BLH, slice(None)), rows)
                for si, scale in enumerate(self.var.config.scale_slices):
                    share = inactive_share(a_BLH, scale)
                    mean.add(f"val_inactive_layer{layer}_scale{si}", share, rows)
        return mean.result()
