"""As few experts as have a share of all scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dmoe_var.config_fields import Share
from dmoe_var.moe.selection.base import Key, SelectionRule
from dmoe_var.moe.selection.finite import check_finite
from dmoe_var.ops import widest_float


@dataclass(frozen=True)
class Cumulative(SelectionRule):
    """The smallest set of experts whose scores sum to at least `share` of the total.

    At least one expert runs, also where the share is 0 or all scores are.
    """

    share: Annotated[Share, Key(0.9, "Share of the scores that the experts of cumulative reach.")]

    name: ClassVar[str] = "cumulative"
    label: ClassVar[str] = "cumulative share"
    colour: ClassVar[str] = "#009E73"
    marker: ClassVar[str] = "^"

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        scores = check_finite(scores)
        ordered, order = scores.to(widest_float(scores.device)).sort(-1, descending=True)
        reached = ordered.cumsum(-1)
        # Shifted, not reached - ordered: that would round, and share = 1 keep or drop too much.
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], dim=-1)
        needed = before < self.share * reached[..., -1:]
        needed[..., 0] = True
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, needed)
