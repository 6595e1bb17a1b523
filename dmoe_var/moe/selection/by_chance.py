"""Rules that select experts by chance. Legend: N tokens, E experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dmoe_var import generators
from dmoe_var.moe.selection.base import SelectionRule
from dmoe_var.moe.selection.top_k import Counted


@dataclass(frozen=True)
class Random(Counted):
    """Selects k experts by chance, whatever the scores: the baseline that any router has to beat.

    Experts are ranked by `noise` (..., E), uniform draws from each image's own stream in the
    sampler. Without it the draws come from `seed`.
    """

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "k at random"
    marker: ClassVar[str] = "X"
    uses_scores: ClassVar[bool] = False
    needs_router: ClassVar[bool] = False

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            generator = generators.seeded(scores.device, self.seed)
            noise = torch.rand(scores.shape, generator=generator, device=scores.device)
        return self._mask(noise)


@dataclass(frozen=True)
class RandomDensity(SelectionRule):
    """Selects `mean` experts per token by chance: each token gets the whole number below or above.

    Over N tokens the mean is met to 1/N. The router runs, as it does for the rule whose density
    this is, but its scores are ignored. Masks are drawn once per shape, so that drawing is not
    timed, and are the same in each layer. It is for benchmarks: no configuration names it.
    """

    mean: Annotated[float, Field(ge=0, le=2**31)]

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        num_experts = scores.shape[-1]
        num_tokens = scores.numel() // num_experts
        return random_mask(self.mean, num_tokens, num_experts, scores.device).view(scores.shape)


@lru_cache(maxsize=64)
def random_mask(mean: float, num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """Draw the mask (N, E) of `RandomDensity`, once."""
    generator = torch.Generator().manual_seed(0)
    ranks_NE = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1).argsort(-1)
    reached = (torch.arange(num_tokens + 1, dtype=torch.float64) * mean).round()
    return (ranks_NE < reached.diff()[:, None]).to(device)
