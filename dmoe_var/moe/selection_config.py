"""Which experts run on a token, as configurations and records name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from dmoe_var.config_fields import STRICT, Several, Share, Taus
from dmoe_var.moe.selection import (
    All,
    Cumulative,
    LayerThreshold,
    Oracle,
    Random,
    SelectionRule,
    Threshold,
    TopK,
)


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


@dataclass(frozen=True)
class SelectionConfig:
    """A selection rule: threshold and oracle read `tau` (one, one a sparse scale, or one a
    scale), top_k and random read `k`, cumulative reads `share`."""

    __pydantic_config__ = STRICT

    rule: Literal["threshold", "oracle", "top_k", "random", "cumulative", "all"] = "threshold"
    tau: Taus = (0.2,)
    k: Annotated[int, Field(gt=0)] = 8
    share: Share = 0.9
    layer_tau: tuple[Annotated[tuple[Share, ...], Several], ...] = ()
    """For threshold, in the place of `tau`: by sparse scale, a tau for each layer."""

    def __post_init__(self) -> None:
        if self.layer_tau and self.rule != "threshold":
            given = [list(taus) for taus in self.layer_tau]
            raise ValueError(f"layer_tau={given} goes with rule=threshold, but rule={self.rule}")

    def rules(self) -> SelectionRule | list[SelectionRule]:
        """What `generate(selection=...)` takes."""
        if self.rule == "threshold" and self.layer_tau:
            return [LayerThreshold(taus) for taus in self.layer_tau]
        if self.rule in ("threshold", "oracle"):
            rule = Threshold if self.rule == "threshold" else Oracle
            rules: list[SelectionRule] = [rule(tau) for tau in self.tau]
            return rules if len(rules) > 1 else rules[0]
        others = {
            "top_k": TopK(self.k),
            "random": Random(self.k),
            "cumulative": Cumulative(self.share),
            "all": All(),
        }
        return others[self.rule]

    @property
    def text(self) -> str:
        """In a few words: "threshold 0.2,0.3"; of a tau for each layer, scales behind ";"."""
        values: dict[str, Any] = {
            "top_k": self.k,
            "random": self.k,
            "cumulative": self.share,
            "all": "",
        }
        if self.rule == "threshold" and self.layer_tau:
            return f"threshold by layer {'; '.join(map(_listed, self.layer_tau))}"
        return f"{self.rule} {values.get(self.rule, _listed(self.tau))}".rstrip()
