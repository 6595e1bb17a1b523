"""Run a layer's router, Eq. 3 and experts in one call, where native.c runs them whatever the mask.

With the few tokens of a small batch, the Python around three calls takes longer than their
products. What stays the same while images are sampled is settled once for each `sampling` block.

Legend: B batch, L tokens, N = B L, C width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from dmoe_var.errors import InputError
from dmoe_var.moe.experts import RAN, ExpertWeights, auto, native
from dmoe_var.moe.router import Router
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import Threshold
from dmoe_var.moe.selection.finite import NOT_FINITE
from dmoe_var.ops import hooked, observed
from dmoe_var.sampling_time import Sampling, this_sampling


class ExpertFFN(Protocol):
    """What is read of a `moe.layer.MoEFFN`."""

    num_experts: int
    expert_size: int
    router: Router
    act: nn.Module

    @property
    def weights(self) -> ExpertWeights: ...


def run(ffn: ExpertFFN, x_BLC: Tensor, routing: Routing) -> Tensor | None:
    """Do what `MoEFFN.select` and `run_experts` do, bit for bit, (B, L, C); None where one call
    cannot, or where somebody looks on."""
    this = this_sampling()
    if (
        this is None
        or type(routing.rule) is not Threshold
        or routing.impl not in ("auto", "native")
        or routing.observer is not None
        or routing.scores_bLE is not None
        or routing.means_KEC is not None
        or x_BLC.numel() == 0
        or observed(x_BLC)
    ):
        return None
    x_NC = x_BLC.flatten(0, 1)
    layer = _layer(ffn, x_NC, this)
    if layer is None or (routing.impl == "auto" and not _is_fastest(ffn, x_NC, this)):
        return None
    out_NC = layer(x_NC, len(x_NC) // routing.sharing, routing.rule.tau)
    if out_NC is None:
        raise InputError(NOT_FINITE)
    RAN["native"] += 1
    return out_NC.view_as(x_BLC)


def _layer(ffn: ExpertFFN, x_NC: Tensor, this: Sampling) -> native.Layer | None:
    """Prepare a layer for the kernel; None if it does not know all of it."""
    case = (id(ffn), x_NC.dtype, x_NC.shape[1])
    if case not in this.settled:
        this.settled[case] = ffn, _prepared(ffn, x_NC)  # which keeps the ffn's id to itself
    layer: native.Layer | None = this.settled[case][1]
    return layer


def _prepared(ffn: ExpertFFN, x_NC: Tensor) -> native.Layer | None:
    router = ffn.router
    linears = (router.fc1, router.fc2)
    if router.condition != "none" or hooked(router, *linears):
        return None
    weights, fcs = ffn.weights, [linear.weight for linear in linears]
    if not (native.can_run(x_NC, weights, ffn.act) and native.knows_router(x_NC, *fcs)):
        return None
    return native.layer(fcs, weights)


def _is_fastest(ffn: ExpertFFN, x_NC: Tensor, this: Sampling) -> bool:
    """Say whether `auto` takes native for so many tokens, whatever their masks."""
    case = (x_NC.shape, x_NC.dtype, ffn.num_experts, ffn.expert_size)
    if case not in this.settled:
        this.settled[case] = auto.by_density(x_NC, ffn.weights, ffn.act) == "native"
    fastest: bool = this.settled[case]
    return fastest
