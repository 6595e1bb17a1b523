"""The expert FFN: an FFN whose neurons are grouped into experts, with a router beside it.

Legend: B batch, b those of its rows that select, L tokens, N = B L, C width, E experts, D neurons
per expert, H = E D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from dmoe_var import values
from dmoe_var.moe.at_once import run as run_at_once
from dmoe_var.moe.experts import ExpertWeights, forget, run_experts
from dmoe_var.moe.observer import Routed
from dmoe_var.moe.router import Condition, Context, Router, default_hidden
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import All
from dmoe_var.moe.skipped_means import add_means
from dmoe_var.ops import activated_linear, activation, at_least_float32, linear


@dataclass(frozen=True)
class SplitConfig:
    """How an FFN is cut into experts."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    expert_size: Annotated[int, Field(gt=0)] = 128
    """Neurons per expert; must divide the FFN's neurons."""
    router_hidden: Annotated[int, Field(gt=0)] | None = None
    """Hidden neurons of a router; null means 128 at the published widths and C / 8 below."""

    def __post_init__(self) -> None:
        values.take_fields(self)


@dataclass(frozen=True)
class ExpertConfig(SplitConfig):
    """The shape of experts and routers."""

    router_condition: Condition = "none"
    """What routers are told beside the token."""


def context_of(routing: Routing, normed_BLC: Tensor | None) -> Context | None:
    """Return what routers under a condition read, of the rows that select."""
    if normed_BLC is None or routing.labels_B is None:
        return None
    b = len(normed_BLC) // routing.sharing
    return Context(normed_BLC[:b].detach(), routing.si, routing.labels_B[:b])


class MoEFFN(nn.Module):
    """Sums act(x W1_e + b1_e) W2_e over the selected e, and adds the shared output bias b2."""

    def __init__(
        self,
        width: int,
        hidden: int,
        act: str,
        config: ExpertConfig,
        num_scales: int = 0,
        num_classes: int = 0,
    ):
        super().__init__()
        self.expert_size = config.expert_size
        self.num_experts = hidden // config.expert_size
        shape = (self.num_experts, self.expert_size, width)
        self.w1_EDC = nn.Parameter(torch.zeros(shape))
        self.b1_ED = nn.Parameter(torch.zeros(shape[:2]))
        self.w2_EDC = nn.Parameter(torch.zeros(shape))
        self.b2_C = nn.Parameter(torch.zeros(width))
        self.act = activation(act)
        router_hidden = config.router_hidden or default_hidden(width)
        told = (config.router_condition, num_scales, num_classes)
        self.router = Router(width, router_hidden, self.num_experts, *told)

    @torch.no_grad()
    def reset_parameters(self, std: float, out_gain: float) -> None:
        """Initialise as the dense FFN does; `out_gain` scales the output weights."""
        nn.init.trunc_normal_(self.w1_EDC, std=std)
        nn.init.trunc_normal_(self.w2_EDC, std=std).mul_(out_gain)
        self.router.reset_parameters()

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.w1_EDC, self.b1_ED, self.w2_EDC, self.b2_C)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEFFN:
        """Drop the packed copy of the old weights; `.to`, `.half` and `.cuda` call this."""
        forget(self.weights)
        super()._apply(fn, recurse)
        return self

    def true_norms(self, x_BLC: Tensor) -> Tensor:
        """Compute ||act(x W1_e + b1_e) W2_e||_2 of every expert, (B, L, E): the router's target.

        The shared output bias is left out. Norms of h W2_e are roots of h (W2_e W2_e^T) h^T, which
        needs D x D products in the place of D x C ones; half precision is widened to float32.
        """
        h_BLH = activated_linear(self.act, x_BLC, self.w1_EDC.flatten(0, 1), self.b1_ED.flatten())
        h_NED = at_least_float32(h_BLH).flatten(0, -2).unflatten(-1, self.b1_ED.shape)
        w2_EDC = at_least_float32(self.w2_EDC)
        with torch.autocast(x_BLC.device.type, enabled=False):
            gram_EDD = w2_EDC @ w2_EDC.mT
            products_END = h_NED.transpose(0, 1) @ gram_EDD
        squares_NE = (products_END.transpose(0, 1) * h_NED).sum(-1)
        return squares_NE.clamp_min(0).sqrt().unflatten(0, x_BLC.shape[:-1])

    def forward(
        self, x_BLC: Tensor, routing: Routing | None = None, normed_BLC: Tensor | None = None
    ) -> Tensor:
        """Run the FFN, (B, L, C). Without routing every expert runs, and the router does not.

        normed_BLC: x_BLC before AdaLN's scale and shift, for a router under a condition.
        """
        observer = None if routing is None else routing.observer
        scores_bLE = None
        if routing is None or isinstance(routing.rule, All):
            mask_BLE = x_BLC.new_ones((*x_BLC.shape[:-1], self.num_experts), dtype=torch.bool)
            out_BLC = self._all_experts(x_BLC)
        elif (at_once := run_at_once(self, x_BLC, routing)) is not None:
            return at_once
        else:
            if observer is not None:
                observer.on_part("selection", routing.si)
            mask_BLE, scores_bLE = self.select(x_BLC, routing, normed_BLC)
            if observer is not None:
                observer.on_part("experts", routing.si)
            x_NC, mask_NE = x_BLC.flatten(0, 1), mask_BLE.flatten(0, 1)
            out_NC = run_experts(x_NC, mask_NE, self.weights, self.act, routing.impl)
            if routing.means_KEC is not None:
                out_NC = add_means(out_NC, mask_NE, routing.means_KEC[routing.layer])
            out_BLC = out_NC.view_as(x_BLC)
        if routing is not None and observer is not None:
            si, layer, kept = routing.si, routing.layer, routing.kept
            observer.on_routing(Routed(si, layer, self, x_BLC, scores_bLE, mask_BLE, kept))
        return out_BLC

    def select(
        self, x_BLC: Tensor, routing: Routing, normed_BLC: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mask (B, L, E) of experts to run, and the scores (b, L, E) the rule read."""
        rule, noise = routing.rule, None
        if routing.noise is not None and not rule.uses_scores:
            noise = routing.noise(x_BLC.shape[1], self.num_experts)
        scores_bLE = routing.scores_bLE
        if scores_bLE is None:
            b = len(x_BLC) // routing.sharing
            x_bLC = x_BLC[:b].detach()  # whoever learns from scores trains the router alone
            scores_bLE = rule.scores(self, x_bLC, context_of(routing, normed_BLC))
        # Not rule(...): torch 2.11's compiler hashes the callee before its fields are set.
        mask_bLE = rule.__call__(scores_bLE, noise)
        mask_BLE = mask_bLE if routing.sharing == 1 else mask_bLE.repeat(routing.sharing, 1, 1)
        return mask_BLE, scores_bLE if rule.uses_scores else None

    def _all_experts(self, x_BLC: Tensor) -> Tensor:
        h_BLH = activated_linear(self.act, x_BLC, self.w1_EDC.flatten(0, 1), self.b1_ED.flatten())
        return linear(h_BLH, self.w2_EDC.flatten(0, 1).T, self.b2_C)


def feed(ffn: nn.Module, x_BLC: Tensor, normed_BLC: Tensor, routing: Routing | None) -> Tensor:
    """Run the FFN of a block, dense or of experts (see `MoEFFN.forward`)."""
    if isinstance(ffn, MoEFFN):
        return ffn(x_BLC, routing, normed_BLC)  # type: ignore[no-any-return]
    return ffn(x_BLC)  # type: ignore[no-any-return]
