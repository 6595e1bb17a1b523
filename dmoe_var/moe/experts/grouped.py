"""Gather each expert's tokens, run it on those alone, add its outputs back.

It is deterministic (experts add in a fixed order), differentiable, and runs on any device. In half
precision the experts add up in float32, and the sum is rounded once, as a dense FFN's is.
Legend: N tokens, C width, E experts, D neurons per expert, n one expert's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.weights import ExpertWeights
from dmoe_var.ops import activated_linear, at_least_float32, unrounded_linear

waits = True
"""Each expert's tokens have to be known."""


def run(x_NC: Tensor, dispatch: Dispatch, weights: ExpertWeights, act: nn.Module) -> Tensor:
    """See `paths.ComputePath`."""
    w1_EDC, b1_ED, w2_EDC, b2_C = weights
    out_NC = at_least_float32(b2_C).expand_as(x_NC).clone()
    for rows_n, w1_DC, b1_D, w2_DC in zip(dispatch.rows, w1_EDC, b1_ED, w2_EDC, strict=True):
        if rows_n.numel() == 0:
            continue
        x_nC = x_NC.index_select(0, rows_n)  # on a CPU x_NC[rows_n] copies element by element
        out_nC = _output(act, x_nC, w1_DC, b1_D, w2_DC, ragged=True)
        out_NC.index_add_(0, rows_n, out_nC.to(out_NC.dtype))
    return out_NC.to(b2_C.dtype)


def outputs(x: Tensor, weights: ExpertWeights, act: nn.Module) -> Iterator[Tensor]:
    """Yield each expert's own output on tokens (..., C), without the shared bias and not rounded
    to half precision."""
    for w1_DC, b1_D, w2_DC in zip(*weights[:3], strict=True):
        yield _output(act, x, w1_DC, b1_D, w2_DC)


def _output(
    act: nn.Module, x: Tensor, w1_DC: Tensor, b1_D: Tensor, w2_DC: Tensor, ragged: bool = False
) -> Tensor:
    """Run one expert; `ragged` is explained in `ops.linear`."""
    h_D = activated_linear(act, x, w1_DC, b1_D, ragged)
    return unrounded_linear(h_D, w2_DC.T, ragged)
