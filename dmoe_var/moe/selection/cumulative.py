"""The rule that selects as few experts as reach a share of all scores."""

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
    """Selects the smallest set of experts whose scores sum to at least `share` of the total.

    At least one expert runs, even if the share or all scores are 0.
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
        # Shifted: `reached - ordered` would round, and share = 1 would keep or drop too much.
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], dim=-1)
        needed = before < self.share * reached[..., -1:]
        needed[..., 0] = True
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, needed)
