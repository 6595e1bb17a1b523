"""Train routers by regression: each learns its experts' output norms (DMoE-VAR, section 3).

Legend: B batch, L tokens of all scales, C width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_var.config_fields import Scales, Share
from dmoe_var.data.image_sets import evenly_strided
from dmoe_var.data.token_cache import TokenSet
from dmoe_var.models.blocks import Rows
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.layer import MoEFFN
from dmoe_var.moe.router import Condition, Context
from dmoe_var.ops import widest_float
from dmoe_var.training.objectives import Mean, TokenObjective, tokens_of
from dmoe_var.training.step import OptimConfig

BRANCHES = ("cond", "null")
CONSTANT_IMAGES = 256
"""Most training images that the constant prediction is averaged over."""


@dataclass(frozen=True)
class RouterConfig(OptimConfig):
    """Training of the routers."""

    null_share: Share = 0.5
    """Share of a batch that runs with the null class, like the unconditional half of guidance."""
    scales: Scales | None = None
    """Scales whose tokens the routers learn from; null takes all, as in the paper."""
    condition: Condition = "none"
    """What routers are told beside the token (beyond the paper): none, scale, class or both."""


def average_ranks(norms_BLE: Tensor) -> Tensor:
    """Rank each expert of a token, from 0; equal norms share their mean rank."""
    norms_BLE = norms_BLE.contiguous()
    ordered_BLE = norms_BLE.sort(-1).values
    below = torch.searchsorted(ordered_BLE, norms_BLE)
    up_to = torch.searchsorted(ordered_BLE, norms_BLE, right=True)
    return (below + up_to - 1).to(widest_float(norms_BLE.device)) / 2


def spearman(predicted_BLE: Tensor, true_BLE: Tensor) -> Tensor:
    """Compute the rank correlation (B, L) over a token's experts, in [-1, 1].

    Ties count as ties: sparse experts have a norm of exactly 0. A token whose norms are all equal
    has no order to predict and gets 0.
    """
    centred = [r - r.mean(-1, keepdim=True) for r in map(average_ranks, (predicted_BLE, true_BLE))]
    covariance_BL = (centred[0] * centred[1]).sum(-1)
    scale_BL = (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()
    return torch.where(scale_BL > 0, covariance_BL / scale_BL.clamp_min(1e-30), 0.0)


def expert_ffns(var: VAR) -> list[MoEFFN]:
    """Return the expert FFN of every block; raise ValueError for a dense model."""
    ffns = [block.ffn for block in var.blocks]
    if not all(isinstance(ffn, MoEFFN) for ffn in ffns):
        raise ValueError("routers belong to a model with experts; split it first")
    return ffns  # type: ignore[return-value]


class RouterObjective(TokenObjective):
    """Mean squared error of predicted against true norms over experts, tokens and layers.

    The labels come from running all experts on teacher-forced tokens; only routers train.
    """

    config: RouterConfig
    most_validated = 1024  # both branches of each, with all norms: 20 images a second on two cores

    def __init__(
        self, moe: VAR, vqvae: VQVAE, training: TokenSet, held_out: TokenSet, config: RouterConfig
    ):
        super().__init__(moe, vqvae, training, held_out, config)
        self.ffns = expert_ffns(moe)
        learnt = config.scales or range(moe.config.num_scales)
        self.learnt_tokens = tokens_of(moe.config, learnt, self.device)
        moe.requires_grad_(False).eval()
        self.module = nn.ModuleList(ffn.router for ffn in self.ffns).requires_grad_(True)

    def _null(self, labels_B: Tensor) -> Tensor:
        return torch.full_like(labels_B, self.var.config.num_classes)

    @torch.no_grad()
    def _run(
        self, labels_B: Tensor, teacher_BLC: Tensor, see: Callable[[int, Tensor, Context], object]
    ) -> None:
        """Run all experts, and call see(layer, x_BLC, context) with what enters each FFN (the
        hidden state after AdaLN) and what its router may be told, as it is computed: nobody has to
        keep the inputs of all layers."""

        def show(layer: int, _: nn.Module, inputs: tuple[Tensor, Any, Tensor]) -> None:
            x_BLC, _, normed_BLC = inputs
            see(layer, x_BLC, Context(normed_BLC, self.var.lvl_1L[0], labels_B))

        with ExitStack() as stack:
            for layer, ffn in enumerate(self.ffns):
                stack.enter_context(ffn.register_forward_pre_hook(partial(show, layer)))
            self.var(labels_B, teacher_BLC)

    def loss(
        self, indices_B: Tensor, step: int, num_steps: int, rows: Rows
    ) -> tuple[Tensor, dict[str, float]]:
        _, labels_B, teacher_BLC = self.batch(self.training, indices_B)
        labels_B = self.with_null(labels_B, rows, self.config.null_share)
        losses: list[Tensor] = []

        def learn(layer: int, x_BLC: Tensor, context: Context) -> None:
            x_BlC, ffn = x_BLC[:, self.learnt_tokens], self.ffns[layer]
            true_BlE = ffn.true_norms(x_BlC)
            with torch.enable_grad():
                predicted_BlE = ffn.router(x_BlC, context.of_tokens(self.learnt_tokens))
                losses.append(F.mse_loss(predicted_BlE, true_BlE))

        self._run(labels_B, teacher_BLC, learn)
        return torch.stack(losses).mean(), {}

    @cached_property
    @torch.no_grad()
    def constants_LE(self) -> list[Tensor]:
        """Average the true norm of each expert, (E,) per layer: the constant prediction to beat.

        Both branches count equally. The training images are spread evenly over the set, because a
        folder's are sorted by class.
        """
        totals = [torch.zeros(ffn.num_experts, device=self.device) for ffn in self.ffns]
        indices = evenly_strided(self.num_examples, CONSTANT_IMAGES)

        def add(layer: int, x_BLC: Tensor, _: Context) -> None:
            norms_BlE = self.ffns[layer].true_norms(x_BLC[:, self.learnt_tokens])
            totals[layer] += norms_BlE.mean((0, 1)) * len(x_BLC)

        for chunk in indices.split(min(64, self.validation_batch)):
            _, labels_B, teacher_BLC = self.batch(self.training, chunk)
            for labels in (labels_B, self._null(labels_B)):
                self._run(labels, teacher_BLC, add)
        return [total / (2 * len(indices)) for total in totals]

    def validate(self) -> dict[str, float]:
        """Measure on held-out images, by branch: the routers' error, the constant's, and how well
        the order of experts is predicted (Spearman), in all and by layer and scale."""
        mean = Mean()
        for _, labels_B, teacher_BLC in self.held_out_batches():
            for branch, labels in zip(BRANCHES, (labels_B, self._null(labels_B)), strict=True):
                add = partial(self._add_layer, mean, branch, self.constants_LE)
                self._run(labels, teacher_BLC, add)
        return mean.result()

    def _add_layer(
        self,
        mean: Mean,
        branch: str,
        constants_LE: list[Tensor],
        layer: int,
        x_BLC: Tensor,
        context: Context,
    ) -> None:
        ffn, constant_E = self.ffns[layer], constants_LE[layer]
        true_BLE, predicted_BLE = ffn.true_norms(x_BLC), ffn.router(x_BLC, context)
        error = F.mse_loss(predicted_BLE, true_BLE)
        constant_error = F.mse_loss(constant_E.expand_as(true_BLE), true_BLE)
        agreement_BL = spearman(predicted_BLE, true_BLE)
        rows = len(x_BLC)
        for suffix in ("", f"_{branch}"):
            mean.add(f"val_mse{suffix}", error, rows)
            mean.add(f"val_mse_constant{suffix}", constant_error, rows)
            mean.add(f"val_rank_agreement{suffix}", agreement_BL.mean(), rows)
        for si, scale in enumerate(self.var.config.scale_slices):
            name = f"layer{layer}_scale{si}"
            scale_error = F.mse_loss(predicted_BLE[:, scale], true_BLE[:, scale])
            mean.add(f"val_mse_{name}", scale_error, rows)
            mean.add(f"val_rank_agreement_{name}", agreement_BL[:, scale].mean(), rows)
