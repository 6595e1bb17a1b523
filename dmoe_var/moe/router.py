"""The router: predicts the L2 norm of every expert's output (DMoE-VAR, router regression).

Under a condition it is told the scale, the class, or both. It then reads the hidden state before
AdaLN mixes the class in, and adds a learnt vector of each to its hidden layer. A vector that is
added to the input would only reach that layer through fc1, with C / R times the weights.

Legend: B batch, L tokens, C width, R router hidden width, E experts, S scales, K all classes with
the null class.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_var.moe import triton_router
from dmoe_var.moe.experts import native
from dmoe_var.ops import Linear, hooked

PUBLISHED_HIDDEN = 128
Condition = Literal["none", "scale", "class", "both"]


class Context(NamedTuple):
    """Holds what a router reads under a condition."""

    normed_BLC: Tensor
    """The hidden state after LayerNorm, before AdaLN's scale and shift."""
    si: int | Tensor
    """The scale of all tokens, or of each, (L,)."""
    labels_B: Tensor
    """The class of each row."""

    def of_tokens(self, tokens: Tensor | slice) -> Context:
        """Return that of some tokens."""
        si = self.si if isinstance(self.si, int) else self.si[tokens]
        return Context(self.normed_BLC[:, tokens], si, self.labels_B)


def default_hidden(width: int) -> int:
    """Return 128 at the published widths (1024 and up), C / 8 below, where 128 costs too much."""
    return PUBLISHED_HIDDEN if width >= 8 * PUBLISHED_HIDDEN else max(1, width // 8)


class Router(nn.Module):
    """Computes |Linear(GELU(Linear(x)))| without biases; x is the FFN's input after AdaLN.

    Under a condition it is |Linear(GELU(Linear(LN(x)) + scale_embed + class_embed))|.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        condition: Condition = "none",
        num_scales: int = 0,
        num_classes: int = 0,
    ):
        super().__init__()
        self.condition = condition
        self.fc1 = Linear(width, hidden, bias=False)
        self.fc2 = Linear(hidden, num_experts, bias=False)
        if condition in ("scale", "both"):
            self.scale_embed_SR = nn.Parameter(torch.zeros(num_scales, hidden))
        if condition in ("class", "both"):
            self.class_embed_KR = nn.Parameter(torch.zeros(num_classes + 1, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise Kaiming-uniform with torch's own gain for Linear (a = sqrt(5)).

        With the gain for ReLU the first predictions are 2.4 times as large, and a short training
        run spends most of its steps on shrinking them.
        """
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))

    def forward(self, x_BLC: Tensor, context: Context | None = None) -> Tensor:
        """Predict the norms (B, L, E), which are non-negative. A condition needs the context."""
        fc1, fc2 = self.fc1, self.fc2
        if self.condition != "none":
            return self._informed(context)
        weights = (fc1.weight, fc2.weight)
        for kernel in (native, triton_router) if x_BLC.numel() else ():
            if kernel.knows_router(x_BLC, *weights) and not hooked(fc1, fc2):
                return kernel.scores(x_BLC, *weights)
        return fc2(F.gelu(fc1(x_BLC))).abs()

    def _informed(self, context: Context | None) -> Tensor:
        if context is None:
            raise ValueError(f"a router with condition={self.condition} needs scale and class")
        h_BLR = self.fc1(context.normed_BLC)
        if self.condition in ("scale", "both"):
            h_BLR = h_BLR + self.scale_embed_SR[context.si]
        if self.condition in ("class", "both"):
            h_BLR = h_BLR + self.class_embed_KR[context.labels_B][:, None]
        return self.fc2(F.gelu(h_BLR)).abs()
