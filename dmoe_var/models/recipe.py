"""Keep with a model how it is meant to be sampled, beside the rules that select experts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import ConfigDict

from dmoe_var import values
from dmoe_var.models.guidance import Cfg, by_scale
from dmoe_var.models.head_skipping import HeadSkipping
from dmoe_var.models.token_skipping import TokenSkipping


@dataclass(frozen=True)
class Recipe:
    """Arguments of `generate` that a `DynamicVAR` was calibrated and measured with; the defaults
    are the published ones."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    cfg: Cfg = 1.5
    share_mask: bool = False
    skipping: TokenSkipping = field(default_factory=TokenSkipping)
    heads: HeadSkipping = field(default_factory=HeadSkipping)

    def __post_init__(self) -> None:
        values.take_fields(self)
        if not self.skipping.scales:  # then how it would skip says nothing
            object.__setattr__(self, "skipping", TokenSkipping())
        if not self.heads.scales:
            object.__setattr__(self, "heads", HeadSkipping())

    def check(self, num_scales: int, depth: int) -> None:
        """Raise ValueError for a model that cannot be sampled so."""
        by_scale(self.cfg, num_scales)
        self.skipping.check(num_scales, depth)
        self.heads.check(num_scales)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments: `generate(model, vqvae, labels, **model.recipe.options)`."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
