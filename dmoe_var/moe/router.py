"""The router: predicts the L2 norm of every expert's output (DMoE-VAR, router regression).

Legend: B batch, L tokens, C width, R router hidden width, E experts.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_var.moe.experts import native
from dmoe_var.ops import Linear, hooked

PUBLISHED_HIDDEN = 128


def default_hidden(width: int) -> int:
    """Return 128 at the published widths (1024 and up), C / 8 below, where 128 costs too much."""
    return PUBLISHED_HIDDEN if width >= 8 * PUBLISHED_HIDDEN else max(1, width // 8)


class Router(nn.Module):
    """Computes |Linear(GELU(Linear(x)))| without biases; x is the FFN's input after AdaLN."""

    def __init__(self, width: int, hidden: int, num_experts: int):
        super().__init__()
        self.fc1 = Linear(width, hidden, bias=False)
        self.fc2 = Linear(hidden, num_experts, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise Kaiming-uniform with torch's own gain for Linear (a = sqrt(5)).

        With the gain for ReLU the first predictions are 2.4 times as large, and a short training
        run spends most of its steps on shrinking them.
        """
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Predict the norms (B, L, E), which are non-negative."""
        fc1, fc2 = self.fc1, self.fc2
        weights = (fc1.weight, fc2.weight)
        if x_BLC.numel() and native.knows(x_BLC, *weights) and not hooked(fc1, fc2):
            return native.scores(x_BLC, *weights)
        return fc2(F.gelu(fc1(x_BLC))).abs()
