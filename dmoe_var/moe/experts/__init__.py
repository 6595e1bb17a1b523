"""Expert execution: one weight layout, several compute paths with one signature.

Legend: N tokens, C width, E experts, D neurons per expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dmoe_var import values
from dmoe_var.errors import ConfigError
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.packed import forget
from dmoe_var.moe.experts.paths import (
    AUTO,
    IMPLEMENTATIONS,
    PATHS,
    PLAIN,
    RAN,
    Impl,
    fallback,
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
    "check_runs_on",
    "forget",
    "paths_on",
    "run_experts",
]


def check_impl(impl: str) -> None:
    """Raise ValueError if a name is no compute path."""
    values.choice("impl", impl, IMPLEMENTATIONS)


def check_runs_on(impl: str, device: torch.device) -> None:
    """Raise ConfigError if a path that is asked for can run nothing at all on a device."""
    if reason := path(impl).missing(device):
        others = ", ".join(name for name in IMPLEMENTATIONS if name != impl)
        raise ConfigError(f"moe.{reason}; allowed: {others}")


def run_experts(
    x_NC: Tensor, mask_NE: Tensor, weights: ExpertWeights, act: nn.Module, impl: str
) -> Tensor:
    """Sum the outputs of the selected experts and add the shared bias, (N, C).

    The mask is bool: outputs are never weighted (Eq. 3). `impl` names a path. An unknown name,
    another mask, or weights that do not fit each other raise ValueError, and so does `triton` on a
    device that it has no kernels for. If `native` or `triton` does not know the tensors (see their
    `can_run`), `grouped` runs instead, on a GPU `reference`.
    """
    check_impl(impl)
    _check(x_NC, mask_NE, weights)
    # torch.compile would break its graph at every expert, since the number of its rows is a value.
    # Without gradients it gets one operator instead; so do fake tensors, which no kernel takes.
    opaque = torch.compiler.is_compiling() or (isinstance(x_NC, FakeTensor) and impl not in PLAIN)
    if opaque and not torch.is_grad_enabled() and (name := _name_of(act)) is not None:
        return _as_operator(x_NC, mask_NE, *weights, name, impl)
    if not path(impl).can_run(x_NC, weights, act):
        impl = fallback(x_NC.device)
    if impl != AUTO:  # which counts what it chooses
        RAN[impl] += 1
    return path(impl).run(x_NC, Dispatch(mask_NE), weights, act)


def _check(x_NC: Tensor, mask_NE: Tensor, weights: ExpertWeights) -> None:
    """Raise ValueError if the weights do not fit each other, or if this is no mask of these tokens
    and experts: kernels read their bytes."""
    E, D, C = weights.w1_EDC.shape
    if [w.shape for w in weights[1:]] != [(E, D), (E, D, C), (C,)]:
        shapes = ", ".join(f"{name} {tuple(w.shape)}" for name, w in weights._asdict().items())
        raise ValueError(f"experts have weights that do not fit each other: {shapes}")
    wanted = (x_NC.shape[0], E)
    if mask_NE.dtype != torch.bool or mask_NE.shape != wanted:
        raise ValueError(
            f"mask_NE is {mask_NE.dtype} of shape {tuple(mask_NE.shape)}; allowed: torch.bool of "
            f"(tokens, experts) = {wanted}"
        )


def _name_of(act: nn.Module) -> str | None:
    """Return the name that `ops.activation` builds this module from; None if there is none."""
    if isinstance(act, nn.ReLU):
        return "relu"
    return "gelu" if isinstance(act, nn.GELU) and act.approximate == "tanh" else None


@torch.library.custom_op(
    "dmoe_var::experts",
    mutates_args=(),
    schema="(Tensor x, Tensor mask, Tensor w1, Tensor b1, Tensor w2, Tensor b2, str act, str impl)"
    " -> Tensor",
)
def _as_operator(x_NC: Tensor, mask_NE: Tensor, *given: Any) -> Tensor:
    *weights, act, impl = given
    return run_experts(x_NC, mask_NE, ExpertWeights(*weights), activation(act), impl)


@_as_operator.register_fake
def _(x_NC: Tensor, mask_NE: Tensor, *given: Any) -> Tensor:
    *_, b2_C, _act, _impl = given
    return torch.empty(x_NC.shape, dtype=b2_C.dtype, device=x_NC.device)
