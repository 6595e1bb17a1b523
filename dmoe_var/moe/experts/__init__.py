"""Expert execution: one weight layout, several compute paths with one signature.

Legend: N tokens, C width, E experts, D neurons of an expert.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dmoe_var import values
from dmoe_var.moe.experts import native as _native
from dmoe_var.moe.experts import triton as _triton
from dmoe_var.moe.experts.auto import fastest
from dmoe_var.moe.experts.grouped import grouped
from dmoe_var.moe.experts.packed import forget
from dmoe_var.moe.experts.reference import reference
from dmoe_var.moe.experts.weights import ComputePath, ExpertWeights
from dmoe_var.ops import activation

__all__ = ["AUTO", "RAN", "ExpertWeights", "check_impl", "forget", "paths_on", "run_experts"]

PATHS: dict[str, ComputePath] = {
    "reference": reference,
    "grouped": grouped,
    "native": _native.native,
    "triton": _triton.triton,
}
_CAN_RUN = {"native": _native.can_run, "triton": _triton.can_run}
AUTO = "auto"
"""The path that is fastest on this machine for such experts, by a table that is measured once."""
IMPLEMENTATIONS = (AUTO, *PATHS)
RAN: Counter[str] = Counter()
"""Calls of each path in this process: what `auto` chose, and what ran in the place of another."""


def check_impl(impl: str) -> None:
    """ValueError for a name that is no compute path."""
    values.choice("impl", impl, IMPLEMENTATIONS)


def paths_on(device: torch.device) -> dict[str, ComputePath]:
    """The paths of PATHS that a device is there for."""
    other = "native" if device.type == "cuda" else "triton"
    missing = device.type == "cuda" and _triton.missing(device) is not None
    left_out = {other, "triton"} if missing else {other}
    return {name: path for name, path in PATHS.items() if name not in left_out}


def run_experts(
    x_NC: Tensor, mask_NE: Tensor, weights: ExpertWeights, act: nn.Module, impl: str
) -> Tensor:
    """Sum of the selected experts' outputs plus the shared bias, (N, C).

    The mask is binary: outputs are never weighted (Eq. 3). `impl` names a path; an unknown one
    raises ValueError, and so does `triton` on a device that it has no kernels for. Tensors that
    `native` or `triton` does not know are run by `grouped`, see their `can_run`.
    """
    check_impl(impl)
    # How many rows an expert gets is a value, and torch.compile would break off at each. Where no
    # gradient is asked for it takes the whole as one operator. So do tensors without values, which
    # no Triton kernel takes.
    name = _name_of(act)
    opaque = torch.compiler.is_compiling() or (
        isinstance(x_NC, FakeTensor) and impl in (AUTO, "triton")
    )
    if opaque and not torch.is_grad_enabled() and name is not None:
        return _as_operator(x_NC, mask_NE, *weights, name, impl)
    if impl == AUTO:
        impl = fastest(paths_on(x_NC.device), x_NC, mask_NE, weights, act)
    if impl in _CAN_RUN and not _CAN_RUN[impl](x_NC, weights, act):
        impl = "grouped"
    RAN[impl] += 1
    return PATHS[impl](x_NC, mask_NE, weights, act)


def _name_of(act: nn.Module) -> str | None:
    """What `activation` calls it; None for one that it does not build."""
    if isinstance(act, nn.ReLU):
        return "relu"
    return "gelu" if isinstance(act, nn.GELU) and act.approximate == "tanh" else None


@torch.library.custom_op(
    "dmoe_var::experts",
    mutates_args=(),
    schema="(Tensor x, Tensor mask, Tensor w1, Tensor b1, Tensor w2, Tensor b2, str act, str impl)"
    " -> Tensor",
)
def _as_operator(
    x_NC: Tensor,
    mask_NE: Tensor,
    w1_EDC: Tensor,
    b1_ED: Tensor,
    w2_EDC: Tensor,
    b2_C: Tensor,
    act: str,
    impl: str,
) -> Tensor:
    weights = ExpertWeights(w1_EDC, b1_ED, w2_EDC, b2_C)
    return run_experts(x_NC, mask_NE, weights, activation(act), impl)


@_as_operator.register_fake
def _(
    x_NC: Tensor,
    mask_NE: Tensor,
    w1_EDC: Tensor,
    b1_ED: Tensor,
    w2_EDC: Tensor,
    b2_C: Tensor,
    act: str,
    impl: str,
) -> Tensor:
    return torch.empty(x_NC.shape, dtype=b2_C.dtype, device=x_NC.device)
