"""Run the whole FFN and zero what was not selected. This path saves no time; it defines the truth.

Legend: N tokens, C width, E experts, D neurons per expert, H = E D.
"""

from __future__ import annotations

from torch import Tensor, nn

from dmoe_var.moe.experts import native
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.weights import ExpertWeights
from dmoe_var.ops import activated_linear, hooked, linear


def run(x_NC: Tensor, dispatch: Dispatch, weights: ExpertWeights, act: nn.Module) -> Tensor:
    """See `paths.ComputePath`."""
    num_experts, size, _ = weights.w1_EDC.shape
    h_NH = activated_linear(act, x_NC, weights.w1_EDC.flatten(0, 1), weights.b1_ED.flatten())
    if not dispatch.is_full():
        h_NED = h_NH.view(-1, num_experts, size)
        # Many times as fast where experts are narrow, and nobody else holds these values
        if isinstance(act, nn.ReLU | nn.GELU) and not hooked(act) and native.knows(h_NED):
            h_NED = native.zeroed(h_NED, dispatch.mask_NE)
        else:
            h_NED = h_NED.masked_fill(~dispatch.mask_NE[..., None], 0)
        h_NH = h_NED.flatten(1)
    return linear(h_NH, weights.w2_EDC.flatten(0, 1).T, weights.b2_C)
