"""What the sampler hands down to the expert FFNs of a scale.

Legend: B batch, L tokens, C width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from dmoe_var.moe.experts import check_impl
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.selection import SelectionRule


@dataclass(frozen=True)
class Routing:
    """One scale's selection, handed down by the sampler to every expert FFN of that scale."""

    rule: SelectionRule
    si: int = 0
    impl: str = "auto"
    observer: Observer | None = None
    noise: Callable[[int, int], Tensor] | None = None
    """(L, E) -> uniform draws (B, L, E) for rules that select by chance."""
    sharing: int = 1
    """So many equal parts of the batch run the experts that the first part selects."""
    layer: int = 0
    """Known where somebody observes."""

    def __post_init__(self) -> None:
        check_impl(self.impl)

    def at(self, layer: int) -> Routing:
        """The routing of one layer."""
        rule = self.rule.at(layer)
        if rule is self.rule and self.observer is None:
            return self
        return replace(self, rule=rule, layer=layer)

    def selecting(self, x_BLC: Tensor) -> Tensor:
        """The rows that select, (B / sharing, L, C)."""
        return x_BLC if self.sharing == 1 else x_BLC[: len(x_BLC) // self.sharing]

    def for_all(self, selected: Tensor) -> Tensor:
        """What those rows selected, (B / sharing, L, E), for every row (B, L, E)."""
        return selected if self.sharing == 1 else selected.repeat(self.sharing, 1, 1)
