"""Expert execution: one weight layout, several compute paths with one signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from dmoe_var import values
from dmoe_var.moe.experts.grouped import grouped
from dmoe_var.moe.experts.reference import reference


class ExpertWeights(NamedTuple):
    """Weights of all experts of a layer. E experts, D neurons each, C width.

    w1_EDC, b1_ED: rows of fc1 and its bias; w2_EDC: columns of fc2; b2_C: the shared output bias.
    """

    w1_EDC: Tensor
    b1_ED: Tensor
    w2_EDC: Tensor
    b2_C: Tensor


ComputePath = Callable[[Tensor, Tensor, ExpertWeights, nn.Module], Tensor]
IMPLEMENTATIONS: dict[str, ComputePath] = {"reference": reference, "grouped": grouped}


def check_impl(impl: str) -> None:
    """ValueError for a name that is no compute path."""
    values.choice("impl", impl, IMPLEMENTATIONS)


def run_experts(
    x_NC: Tensor, mask_NE: Tensor, weights: ExpertWeights, act: nn.Module, impl: str
) -> Tensor:
    """Sum of the selected experts' outputs plus the shared bias, (N, C).

    The mask is binary: outputs are never weighted (Eq. 3). `impl` names a path of IMPLEMENTATIONS;
    an unknown one raises ValueError.
    """
    check_impl(impl)
    return IMPLEMENTATIONS[impl](x_NC, mask_NE, weights, act)
