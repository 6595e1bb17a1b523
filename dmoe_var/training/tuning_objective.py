"""Train experts and routers under the mask that sampling runs: tau in the loss (beyond the paper).

The paper sets tau after training. Here the dense model runs the other scales and the experts run
theirs scale by scale over one K/V cache, as in sampling. So experts learn to do without those that
the mask leaves out, and routers follow the experts that move. Legend: B batch, L tokens of all
scales, l those with experts, E experts, V vocabulary, R rows (2B: [cond; null], or B).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dmoe_var.config_fields import PathOrName, Share, Taus
from dmoe_var.data.token_cache import TokenSet
from dmoe_var.models.blocks import Rows
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.guidance import Cfg, guide, strengths, text
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.observer import Observer, Routed
from dmoe_var.training.objectives import Mean, TokenObjective, select_trainable, tokens_of
from dmoe_var.training.router_objective import expert_ffns, spearman
from dmoe_var.training.step import OptimConfig

IMPL = "reference"
"""It has gradients, and its matrices have one shape whatever the mask."""


@dataclass(frozen=True)
class TuneConfig(OptimConfig):
    """Training of experts and routers under the mask; without steps and epochs there is none."""

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimiser steps; null or 0 leaves experts untuned, if epochs is null."""
    start: PathOrName | None = None
    """VAR with experts and routers that tuning begins with, of which later stages ask the content
    too: one that was tuned at another tau, for example. null takes that of train_router."""
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-4
    """Learning rate after the warmup."""
    tau: Taus = (0.2,)
    """Tau of the mask: one, one per sparse scale, or one per scale."""
    router_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the routers' squared error; only they learn from it."""
    null_share: Share = 0.5
    """Share of a batch that runs with the null class, like the unconditional half of guidance.
    With guidance every image runs with both classes."""
    blocks: bool = False
    """Whether whole blocks and the head train, as in sparse fine-tuning, or experts and their
    routers alone."""
    distill: Share = 0.0
    """Share of the cross-entropy that gives way to the divergence from the dense model's
    predictions."""
    guidance: Cfg = 0.0
    """Strength, as sampling.cfg, of the guidance under which predictions are distilled: both halves
    of each image run and are joined as in sampling. 0 distils each row alone."""

    def __post_init__(self) -> None:
        if not self.on:
            return
        super().__post_init__()
        if self.guided and not self.distill:
            raise ValueError(
                f"guidance={text(self.guidance)} joins predictions that are distilled, but "
                "distill=0; allowed: distill above 0, or guidance=0"
            )

    @property
    def guided(self) -> bool:
        """Whether predictions are joined before they are distilled."""
        return any(self.guidance) if isinstance(self.guidance, tuple) else self.guidance > 0

    @property
    def on(self) -> bool:
        """Whether experts are tuned."""
        return bool(self.steps or self.epochs)


class _RouterErrors(Observer):
    """Adds up the routers' squared error over layers and tokens."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def on_routing(self, routed: Routed) -> None:
        assert routed.scores_bLE is not None
        with torch.no_grad():
            true_BLE = routed.ffn.true_norms(routed.x_BLC)  # type: ignore[operator]
        self._sum = self._sum + F.mse_loss(routed.scores_bLE, true_BLE, reduction="sum")
        self._count += true_BLE.numel()

    @property
    def mean(self) -> Tensor:
        return self._sum / self._count  # type: ignore[return-value]


class _Measured(Observer):
    """Adds to `mean` how many experts run, and how well routers do."""

    def __init__(self, mean: Mean):
        self.mean = mean

    def on_routing(self, routed: Routed) -> None:
        mask_BLE, scores_BLE = routed.mask_BLE, routed.scores_bLE
        assert scores_BLE is not None
        true_BLE = routed.ffn.true_norms(routed.x_BLC)  # type: ignore[operator]
        density, tokens = mask_BLE.float().mean(), mask_BLE[..., 0].numel()
        self.mean.add("val_density", density, tokens)
        self.mean.add(f"val_density_scale{routed.si}", density, tokens)
        self.mean.add("val_mse", F.mse_loss(scores_BLE, true_BLE), tokens)
        self.mean.add("val_rank_agreement", spearman(scores_BLE, true_BLE).mean(), tokens)


class TuningObjective(TokenObjective):
    """Prediction of the tokens at scales with experts, under the mask, plus the routers' error.

    The mask itself is not differentiated. Experts (with the shared output bias) and routers train,
    and if asked for all else in the blocks and the head. The dense model stays as it is.
    """

    config: TuneConfig
    most_validated = 1024  # every expert runs on every token, scale by scale

    def __init__(
        self,
        model: DynamicVAR,
        vqvae: VQVAE,
        training: TokenSet,
        held_out: TokenSet,
        config: TuneConfig,
    ):
        super().__init__(model.moe, vqvae, training, held_out, config)
        self.model = model
        self.learnt_tokens = tokens_of(model.config, model.moe_scales, self.device)
        ffns = expert_ffns(model.moe)
        model.requires_grad_(False).eval()
        self.learn_from(model.dense, config.distill)
        if config.guided:
            self.join = partial(guide, t=self._strength())
        self.module = model.moe if config.blocks else nn.ModuleList(ffns).requires_grad_(True)
        if config.blocks:
            select_trainable(model.moe, "blocks+head")

    def _strength(self) -> Tensor:
        """Compute guidance's strength at each learnt token, (l, 1)."""
        config = self.model.config
        by_token = torch.zeros(config.num_tokens, 1, device=self.device)
        by_scale = strengths(self.config.guidance, config.num_scales)
        for tokens, strength in zip(config.scale_slices, by_scale, strict=True):
            by_token[tokens] = strength
        return by_token[self.learnt_tokens]

    def _halves(
        self, tokens_BL: Tensor, labels_B: Tensor, teacher_BLC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stack guidance's two halves, [cond; null], if their predictions are joined."""
        if not self.config.guided:
            return tokens_BL, labels_B, teacher_BLC
        null_B = torch.full_like(labels_B, self.model.config.num_classes)
        return tokens_BL.repeat(2, 1), torch.cat([labels_B, null_B]), teacher_BLC.repeat(2, 1, 1)

    def loss(
        self, indices_B: Tensor, step: int, num_steps: int, rows: Rows
    ) -> tuple[Tensor, dict[str, float]]:
        tokens_BL, labels_B, teacher_BLC = self.batch(self.training, indices_B)
        if not self.config.guided:
            labels_B = self.with_null(labels_B, rows, self.config.null_share)
        tokens_BL, labels_B, teacher_BLC = self._halves(tokens_BL, labels_B, teacher_BLC)
        errors = _RouterErrors()
        logits_BLV = self.model.forward_with_gradients(
            labels_B, teacher_BLC, self.config.tau, IMPL, errors
        )
        prediction, logged = self.prediction_loss(logits_BLV, tokens_BL, labels_B, teacher_BLC)
        logged = logged or {"ce": prediction.item()}
        loss = prediction + self.config.router_weight * errors.mean
        return loss, {**logged, "router_mse": errors.mean.item()}

    def validate(self) -> dict[str, float]:
        """Measure on held-out images under the mask, at scales with experts: cross-entropy and
        density, in all and by scale, and how well routers predict the norms. With guidance all but
        the cross-entropy is that of both halves."""
        mean = Mean()
        for batch in self.held_out_batches():
            tokens_BL, (_, labels_R, teacher_RLC) = batch[0], self._halves(*batch)
            given = (labels_R, teacher_RLC, self.config.tau)
            logits_RLV = self.model(*given, impl=IMPL, observer=_Measured(mean))
            logits_BLV = logits_RLV[: len(tokens_BL)]
            loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")
            mean.add("val_ce", loss_BL[:, self.learnt_tokens].mean(), len(tokens_BL))
            self.add_divergence(mean, logits_RLV, labels_R, teacher_RLC)
            for si in self.model.moe_scales:
                scale = self.model.config.scale_slices[si]
                mean.add(f"val_ce_scale{si}", loss_BL[:, scale].mean(), len(tokens_BL))
        return mean.result()
