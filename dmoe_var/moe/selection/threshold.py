"""Eq. 3 on the router's scores, on true norms (oracle), and with one tau per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dmoe_var.config_fields import Several, Share, Taus
from dmoe_var.moe import triton_router
from dmoe_var.moe.experts import native
from dmoe_var.moe.selection.base import Key, SelectionRule
from dmoe_var.moe.selection.finite import check_finite, require_finite


@dataclass(frozen=True)
class Threshold(SelectionRule):
    """Applies Eq. 3: expert e runs iff score_e >= tau * max_j score_j. tau = 0 runs all experts."""

    tau: Annotated[
        Share,
        Key(
            (0.2,),
            "Eq. 3's tau (threshold, oracle, keys): one, one per sparse scale, or one per scale.",
            by_scale=Taus,
        ),
    ]

    name: ClassVar[str] = "threshold"
    label: ClassVar[str] = "Eq. 3, evaluated alone"
    proposed: ClassVar[bool] = True

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.tau == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        if scores.numel() and native.knows(scores):
            mask = native.threshold(scores, self.tau)
            return check_finite(scores) if mask is None else mask
        if scores.numel() and triton_router.knows(scores):
            mask, finite = triton_router.threshold(scores, self.tau)
            require_finite(finite)
            return mask
        scores = check_finite(scores)
        return scores >= self.tau * scores.amax(-1, keepdim=True)


@dataclass(frozen=True)
class Oracle(Threshold):
    """Applies Eq. 3 to the true norms: an upper bound for any router."""

    name: ClassVar[str] = "oracle"
    label: ClassVar[str] = "Eq. 3 on true norms (oracle)"
    colour: ClassVar[str] = "#56B4E9"
    marker: ClassVar[str] = "D"
    proposed: ClassVar[bool] = False
    needs_router: ClassVar[bool] = False
    true_norms: ClassVar[bool] = True


_ByScale = tuple[Annotated[tuple[Share, ...], Several], ...]


@dataclass(frozen=True)
class LayerThreshold(SelectionRule):
    """Applies Eq. 3 with one tau per layer."""

    taus: Annotated[
        tuple[Share, ...],
        Several,
        Key(
            (),
            "In the place of tau, for threshold: by sparse scale, a tau for each layer.",
            by_scale=_ByScale,
            name="layer_tau",
        ),
    ]

    name: ClassVar[str] = "layer_threshold"
    label: ClassVar[str] = "a tau a layer"
    wording: ClassVar[str] = "threshold by layer"
    proposed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # Built here, because a compiled model reads them and could not build them.
        object.__setattr__(self, "_by_layer", tuple(map(Threshold, self.taus)))

    def at(self, layer: int) -> SelectionRule:
        by_layer: tuple[Threshold, ...] = self._by_layer  # type: ignore[attr-defined]
        return by_layer[layer]

    def misfit(self, depth: int, num_experts: int) -> tuple[str, str] | None:
        if len(self.taus) == depth:
            return None
        more = "more" if depth > len(self.taus) else "fewer"
        return "taus", f"is for {len(self.taus)} layers, the model has {more} ({depth})"

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        raise TypeError("a rule by layer selects through at(layer)")
