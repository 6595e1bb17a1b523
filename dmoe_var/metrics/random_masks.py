"""Masks by chance of a given density, to time experts by: what a router's choices cost beside them.

Legend: N tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dmoe_var import values
from dmoe_var.moe.selection import SelectionRule


@dataclass(frozen=True)
class RandomDensity(SelectionRule):
    """Experts by chance, `mean` of them a token: each token has the whole number below or above.

    Over N tokens the mean is met to 1/N. The router runs, as it does for the rule whose density
    this is; its scores are not looked at. Masks are drawn once a shape, so that it is not drawing
    that is timed, and are the same in each layer.
    """

    mean: float

    def __post_init__(self) -> None:
        self._set("mean", values.number("mean", self.mean, 0, 2**31))

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        num_experts = scores.shape[-1]
        num_tokens = scores.numel() // num_experts
        return random_mask(self.mean, num_tokens, num_experts, scores.device).view(scores.shape)


@lru_cache(maxsize=64)
def random_mask(mean: float, num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """(N, E): as in `RandomDensity`, drawn once."""
    generator = torch.Generator().manual_seed(0)
    ranks_NE = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1).argsort(-1)
    reached = (torch.arange(num_tokens + 1, dtype=torch.float64) * mean).round()
    return (ranks_NE < reached.diff()[:, None]).to(device)
