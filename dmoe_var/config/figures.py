"""Configure which figures are plotted, and over what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from dmoe_var.config_fields import (
    STRICT,
    Distinct,
    PathOrName,
    Positive,
    PositiveShare,
    Scales,
    Seed,
    Several,
    Share,
)

QUICK_VALUES = 4
"""Values along a curve of a quick figure."""


def _as_text(value: Any) -> Any:
    """Turn names of figures into a tuple of strings, as YAML reads most of them as numbers."""
    return tuple(map(str, value if isinstance(value, list | tuple) else (value,)))


Alpha = Annotated[float, Field(ge=0)]
NotAll = Annotated[float, Field(ge=0, lt=1)]
Figures = Annotated[tuple[str, ...], BeforeValidator(_as_text), Field(min_length=1)]


@dataclass(frozen=True)
class FiguresConfig:
    """Which figures are plotted, and over which values."""

    __pydantic_config__ = STRICT

    figure: Figures = ("all",)
    """Figures to plot: all (the paper's), or names: 2a to 12, rules, calibration, guidance,
    drafted, skipped, skipping, heads, conditions, tuned, techniques, accounting, learning."""
    make: bool = False
    """First make the records that are missing."""
    plan: bool = False
    """Print what would be made, in order, and do nothing."""
    quick: bool = False
    """Use one seed, quick_samples images per point and four values per curve; figures say so."""
    quick_samples: Annotated[int, Field(ge=2)] = 500
    """Images per point of a quick figure."""
    seeds: Annotated[tuple[Seed, ...], Several, Distinct] = (0, 1, 2)
    """Seeds of the points."""
    tau: Annotated[tuple[Share, ...], Several, Distinct] = (
        0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4,
    )  # fmt: skip
    """Tau of every curve over tau."""
    pruned_shares: Annotated[tuple[NotAll, ...], Several] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Shares of the neurons that pruning drops."""
    k_shares: Annotated[tuple[PositiveShare, ...], Several] = (0.25, 0.375, 0.5, 0.75)
    """Densities (shares of experts) of top-k and random."""
    cumulative_shares: Annotated[tuple[Share, ...], Several] = (0.7, 0.8, 0.9, 0.95)
    """Shares of the cumulative rule."""
    alphas: Annotated[tuple[Alpha, ...], Several] = (0, 1e-3, 1e-2, 1e-1)
    """Weights of the Hoyer loss."""
    router_alphas: tuple[Alpha, Alpha] = (1e-3, 1e-1)
    """A low and a high alpha, for figure 10."""
    hoyer_alpha: Annotated[float, Field(gt=0)] = 1e-3
    """Alpha of ReLU and Hoyer in figure 7 if sparsify.alpha is 0."""
    gelu_alpha: Alpha = 2e-4
    """Alpha of the fine-tuning without ReLUfication (figure 7)."""
    expert_sizes: Annotated[tuple[Positive, ...], Several] = (8, 16, 32, 64, 128, 256)
    """Neurons per expert."""
    single_scales: Scales | None = None
    """Scales that run experts alone (figure 4); null is the last five."""
    tuned_tau: Annotated[tuple[Share, ...], Several, Distinct] = (0.4, 0.5)
    """Tau that experts are tuned at (figure tuned)."""
    tuned_steps: Positive = 150
    """Steps of that tuning."""
    depths: Mapping[Annotated[str, Field(pattern=r"^[1-9]\d*$")], PathOrName | None] = field(
        default_factory=dict
    )
    """Sources of dense VARs by depth, as base.var, beside the experiment's own (figures 3 and 5);
    null trains one."""
    budgets: Annotated[tuple[PositiveShare, ...], Several, Distinct] = (0.8, 0.9)
    """Shares of the dense FLOPs at which ways to choose tau are compared (figure calibration)."""
    batch_size: Positive = 8
    """Images per batch in timings (figures 8b and 9)."""
    time_tau: Annotated[tuple[Share, ...], Several, Distinct] = (0.0, 0.1, 0.2, 0.4)
    """Tau that are timed (figure 9)."""
    skipped: Annotated[tuple[NotAll, ...], Several] = (0.25, 0.4, 0.5)
    """Shares of the tokens that are skipped at the last two scales (figure skipping)."""
    heads: Annotated[tuple[NotAll, ...], Several] = (0.25, 0.5, 0.75)
    """Shares of the heads that are left out at the last three scales (figure heads)."""

    @property
    def used_seeds(self) -> tuple[int, ...]:
        return self.seeds[:1] if self.quick else self.seeds

    def along(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Pick the values of a curve: all, or four of them, evenly from first to last, if quick."""
        if not self.quick or len(values) <= QUICK_VALUES:
            return values
        places = np.linspace(0, len(values) - 1, QUICK_VALUES).round().astype(int)
        return tuple(values[place] for place in places)
