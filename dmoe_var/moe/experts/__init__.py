"""Expert execution: one weight layout, several compute paths with one signature.

Legend: N tokens, C width, E experts, D neurons of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dmoe_var import values
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.packed import forget
from dmoe_var.moe.experts.paths import (
    AUTO,
    FALLBACK,
    IMPLEMENTATIONS,
    PATHS,
    PLAIN,
    RAN,
    Impl,
    path,
    paths_on,
)
from dmoe_var.moe.experts.weights import ExpertWeights
from dmoe_var.ops import activation

__all__ = [
    "PATHS",
    "RAN",
    "Dispatch",
    "ExpertWeights",
    "Impl",
    "check_impl",
    "forget",
    "paths_on",
    "run_experts",
]


def check_impl(impl: str) -> None:
    """ValueError for a name that is no compute path."""
    values.choice("impl", impl, IMPLEMENTATIONS)


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
    # no kernel takes.
    opaque = torch.compiler.is_compiling() or (isinstance(x_NC, FakeTensor) and impl not in PLAIN)
    if opaque and not torch.is_grad_enabled() and (name := _name_of(act)) is not None:
        return _as_operator(x_NC, mask_NE, *weights, name, impl)
    if not path(impl).can_run(x_NC, weights, act):
        impl = FALLBACK
    if impl != AUTO:  # which counts what it chooses
        RAN[impl] += 1
    return path(impl).run(x_NC, Dispatch(mask_NE), weights, act)


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
