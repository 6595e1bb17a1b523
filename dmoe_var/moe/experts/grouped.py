"""Gather each expert's tokens, run it on those alone, add its outputs back.

Deterministic (experts add in a fixed order), differentiable, any device. In half precision the
experts add up in float32, and the sum is rounded once, as a dense FFN's is.
Legend: N tokens, C width, E experts, D neurons an expert, P (token, expert) pairs, n one
expert's tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from dmoe_var.moe.experts.weights import ExpertWeights
from dmoe_var.ops import at_least_float32, linear, unrounded_linear


def grouped(x_NC: Tensor, mask_NE: Tensor, weights: ExpertWeights, act: nn.Module) -> Tensor:
    """See `run_experts`."""
    w1_EDC, b1_ED, w2_EDC, b2_C = weights
    out_NC = at_least_float32(b2_C).expand_as(x_NC).clone()
    tokens_P = mask_NE.T.nonzero()[:, 1]
    counts_E = mask_NE.sum(0).tolist()
    for expert, rows_n in enumerate(tokens_P.split(counts_E)):
        if rows_n.numel() == 0:
            continue
        w1_DC, b1_D, w2_DC = (w[expert] for w in (w1_EDC, b1_ED, w2_EDC))
        x_nC = x_NC.index_select(0, rows_n)  # x_NC[rows_n] takes an element at a time on a CPU
        h_nD = act(linear(x_nC, w1_DC, b1_D, ragged=True))
        out_nC = unrounded_linear(h_nD, w2_DC.T, ragged=True)
        out_NC.index_add_(0, rows_n, out_nC.to(out_NC.dtype))
    return out_NC.to(b2_C.dtype)
