"""A gate without parameters, as in EMoE, which a trained router has to beat.

Legend: B batch, L tokens, C width, D neurons per expert, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmoe_var.moe.selection.finite import check_finite
from dmoe_var.moe.selection.threshold import Threshold
from dmoe_var.ops import linear


@dataclass(frozen=True)
class Keys(Threshold):
    """Applies Eq. 3 to x . key_e; an expert's key is the mean of its neurons' fc1 rows.

    Scores have a sign. If none is positive, only the experts with the largest score run.
    """

    name: ClassVar[str] = "keys"
    label: ClassVar[str] = "Eq. 3 on keys (no router)"
    colour: ClassVar[str] = "#CC79A7"
    marker: ClassVar[str] = "v"
    proposed: ClassVar[bool] = False
    needs_router: ClassVar[bool] = False

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.tau == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        largest = check_finite(scores).amax(-1, keepdim=True)
        return scores >= torch.where(largest > 0, self.tau * largest, largest)

    def scores(self, ffn: Any, x_BLC: Tensor, context: Any = None) -> Tensor:
        return linear(x_BLC, ffn.w1_EDC.mean(1))

    def score_macs(self, width: int, num_experts: int) -> int:
        return width * num_experts
