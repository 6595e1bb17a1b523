"""Run a layer's router, Eq. 3 and experts in one call of native.c, or router and Eq. 3 alone where
another path may be faster for the mask that they give.

With the few tokens of a small batch, the Python around three calls takes longer than their
products. What stays the same while images are sampled is settled once for each `sampling` block.

Legend: B batch, L tokens, N = B L, C width.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor, get_num_threads, nn

from dmoe_var.errors import InputError
from dmoe_var.moe.experts import RAN, ExpertWeights, auto, native
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.router import Router
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import Threshold
from dmoe_var.moe.selection.finite import NOT_FINITE
from dmoe_var.ops import hooked, observed
from dmoe_var.sampling_time import Sampling, this_sampling

Found = TypeVar("Found")


class ExpertFFN(Protocol):
    """What is read of a `moe.layer.MoEFFN`."""

    num_experts: int
    expert_size: int
    router: Router
    act: nn.Module

    @property
    def weights(self) -> ExpertWeights: ...


def run(ffn: ExpertFFN, x_BLC: Tensor, routing: Routing) -> Tensor | None:
    """Do what `MoEFFN.select` and `run_experts` do, bit for bit, (B, L, C). Return None outside of
    `sampling`, for what native.c does not know of the layer, the rule or the path, and where
    somebody looks on."""
    prepared = _prepared(ffn, x_BLC, routing)
    if prepared is None:
        return None
    layer, x_NC, choosing = prepared
    found = "native" if routing.impl == "native" else _fastest(ffn, x_NC)
    if found == "native":
        out_NC = _finite(layer.run(x_NC, *choosing))
        RAN["native"] += 1
    else:
        dispatch = _finite(layer.select(x_NC, *choosing))
        out_NC = auto.run_known(found, x_NC, dispatch, ffn.weights, ffn.act)
    return out_NC.view_as(x_BLC)


def select(ffn: ExpertFFN, x_BLC: Tensor, routing: Routing) -> Dispatch | None:
    """Choose the experts as `run` does, and do not run them. Return None where `run` does."""
    prepared = _prepared(ffn, x_BLC, routing)
    if prepared is None:
        return None
    layer, x_NC, choosing = prepared
    return _finite(layer.select(x_NC, *choosing))


def _finite(found: Found | None) -> Found:
    """Return what the kernel found. Raise InputError if a score was not finite."""
    if found is None:
        raise InputError(NOT_FINITE)
    return found


def _prepared(
    ffn: ExpertFFN, x_BLC: Tensor, routing: Routing
) -> tuple[native.Layer, Tensor, tuple[int, float]] | None:
    """Return the layer for the kernel, its tokens, and how many of them choose, by which tau; None
    for what `run` does not know."""
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
    if layer is None:
        return None
    return layer, x_NC, (len(x_NC) // routing.sharing, routing.rule.tau)


def _layer(ffn: ExpertFFN, x_NC: Tensor, this: Sampling) -> native.Layer | None:
    """Prepare a layer for the kernel; None if it does not know all of it."""
    case = (id(ffn), x_NC.dtype, x_NC.shape[1])
    if case not in this.settled:
        this.settled[case] = ffn, _packed(ffn, x_NC)  # which keeps the ffn's id to itself
    layer: native.Layer | None = this.settled[case][1]
    return layer


def _packed(ffn: ExpertFFN, x_NC: Tensor) -> native.Layer | None:
    router = ffn.router
    linears = (router.fc1, router.fc2)
    if router.condition != "none" or hooked(router, *linears):
        return None
    weights, fcs = ffn.weights, [linear.weight for linear in linears]
    return native.Layer(fcs, weights) if native.knows_layer(x_NC, fcs, weights, ffn.act) else None


def _fastest(ffn: ExpertFFN, x_NC: Tensor) -> str | auto.Seconds:
    """Return what `auto.by_density` finds for a layer that the kernel knows, once a process."""
    case = ("layer", x_NC.shape, x_NC.dtype, ffn.num_experts, ffn.expert_size, get_num_threads())
    found: str | auto.Seconds | None = auto.known.get(case)
    if found is None:
        found = auto.known[case] = auto.by_density(x_NC, ffn.weights, ffn.act)
    return found
