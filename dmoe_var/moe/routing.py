"""What the sampler hands down to the expert FFNs of a scale.

Legend: B batch, b those of its rows that select, L tokens, C width, E experts, K layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from dmoe_var.moe.kept import Kept
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.selection import SelectionRule


@dataclass(frozen=True)
class Routing:
    """Tells every expert FFN of one scale how to select and run its experts."""

    rule: SelectionRule
    si: int = 0
    impl: str = "auto"
    observer: Observer | None = None
    noise: Callable[[int, int], Tensor] | None = None
    """Draws uniform noise (B, L, E), given L and E, for rules that select by chance."""
    sharing: int = 1
    """Number of equal parts of the batch that all run the experts that the first one selects."""
    labels_B: Tensor | None = None
    """The class of each row, for routers under a condition."""
    kept: Kept | None = None
    """The tokens that pass the FFN; None is all."""
    scores_bLE: Tensor | None = None
    """Scores of those tokens by which the rule is to select; None lets it compute them."""
    layer: int = 0
    """Set only if the rule or the means differ by layer, or somebody observes."""
    means_KEC: Tensor | None = None
    """What stands for experts that do not run (see `moe.skipped_means`); None adds nothing."""

    def at(self, layer: int) -> Routing:
        """Return the routing of one layer."""
        rule = self.rule.at(layer)
        if rule is self.rule and self.observer is None and self.means_KEC is None:
            return self
        return replace(self, rule=rule, layer=layer)
