"""The rule that selects the k experts with the largest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dmoe_var.moe.selection.base import Count, Key, SelectionRule
from dmoe_var.moe.selection.finite import check_finite


@dataclass(frozen=True)
class Counted(SelectionRule):
    """Base of rules that run k experts per token."""

    k: Annotated[Count, Key(8, "Experts per token (top_k, random).")]

    def misfit(self, depth: int, num_experts: int) -> tuple[str, str] | None:
        if self.k <= num_experts:
            return None
        return "k", f"must be at most {num_experts}, the number of experts"

    def _mask(self, ranks: Tensor) -> Tensor:
        """Select exactly k experts per token; ties go to torch.topk's order."""
        self.check(0, ranks.shape[-1])
        chosen = ranks.topk(self.k, dim=-1).indices
        return torch.zeros_like(ranks, dtype=torch.bool).scatter(-1, chosen, True)


@dataclass(frozen=True)
class TopK(Counted):
    """Selects the k experts with the largest scores."""

    name: ClassVar[str] = "top_k"
    label: ClassVar[str] = "top-k"
    colour: ClassVar[str] = "#8C6D00"
    marker: ClassVar[str] = "P"

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._mask(check_finite(scores))
