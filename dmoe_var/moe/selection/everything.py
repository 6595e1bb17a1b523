"""The rule that selects every expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dmoe_var.moe.selection.base import SelectionRule


@dataclass(frozen=True)
class All(SelectionRule):
    """Runs every expert on every token, as the unsplit FFN does."""

    name: ClassVar[str] = "all"
    label: ClassVar[str] = "all experts"
    uses_scores: ClassVar[bool] = False
    needs_router: ClassVar[bool] = False

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)
