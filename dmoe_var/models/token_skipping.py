"""Token skipping: at late scales few tokens pass a block's attention and FFN.

A token's measure is its squared distance from the mean of the map at the block's attention or FFN;
those of the largest are kept, chosen anew for each. The others get what the same attention or FFN
gave at an earlier scale, resized to this one's map. Their keys and values are in no cache. The idea
is FastVAR's (2503.23367). An FFN can also go by its router's scores.

Legend: R rows of the transformer's batch, r those of them that choose, l tokens of a scale (p x p),
K those kept, C width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from dmoe_var import values
from dmoe_var.moe.kept import Kept
from dmoe_var.moe.layer import context_of, feed
from dmoe_var.ops import at_least_float32

if TYPE_CHECKING:
    from dmoe_var.moe.routing import Routing
    from dmoe_var.moe.selection import SelectionRule

Outputs = dict[tuple[str, int], Tensor]
"""What attention and FFN of each layer gave at the source, (R, l, C)."""


@dataclass(frozen=True)
class TokenSkipping:
    """Which tokens of late scales skip the blocks (beyond the paper)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    ratios: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Share of the tokens that is skipped, one per scale; an empty list skips none."""
    measure: Literal["distance", "router"] = "distance"
    """What FFNs keep tokens by: distance from the map's mean, or router, the sum of its scores.
    Attention goes by distance."""
    first_layer: Annotated[int, Field(ge=0)] = 3
    """First block that is skipped, from 0."""
    source: Annotated[int, Field(ge=0)] | None = None
    """Scale whose outputs skipped tokens get; null is the one before the first that skips."""

    def __post_init__(self) -> None:
        values.take_fields(self)

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales at which tokens may be skipped."""
        return tuple(si for si, ratio in enumerate(self.ratios) if ratio > 0)

    def check(self, num_scales: int, depth: int) -> None:
        """Raise ValueError for a model of which this cannot skip tokens."""
        if self.ratios and len(self.ratios) != num_scales:
            raise ValueError(
                f"skipping.ratios={values.shown(self.ratios)} has {len(self.ratios)} values; "
                f"allowed: none, or one for each of {num_scales} scales"
            )
        if not self.scales:
            return
        first = self.scales[0]
        if first == 0:
            raise ValueError(f"skipping.ratios={values.shown(self.ratios)} must begin with 0")
        if self.source is not None and self.source >= first:
            raise ValueError(
                f"skipping.source={self.source} must be within 0..{first - 1}, before the first "
                "scale that skips tokens"
            )
        if self.first_layer >= depth:
            raise ValueError(
                f"skipping.first_layer={self.first_layer} must be within 0..{depth - 1}"
            )

    def check_routers(self, rules: Mapping[int, SelectionRule]) -> None:
        """Raise ValueError if a scale whose tokens go by router has no rule that runs routers."""
        without = [si for si in self.scales if si not in rules or not rules[si].needs_router]
        if self.measure == "router" and without:
            raise ValueError(
                f"skipping.measure=router: no router runs at scale {without[0]}; allowed: distance"
            )

    def at(self, si: int, patch_nums: Sequence[int], sharing: int) -> ScaleSkipping | None:
        """Tell what a scale has to do with it; None if nothing. sharing: see `ScaleSkipping`."""
        if not self.scales:
            return None
        source = self.scales[0] - 1 if self.source is None else self.source
        num_tokens = patch_nums[si] ** 2
        num_kept = max(1, num_tokens - round(self.ratios[si] * num_tokens))
        if si != source and num_kept == num_tokens:
            return None
        sides = (patch_nums[source], patch_nums[si])
        return ScaleSkipping(sides, num_kept, self.first_layer, self.measure, sharing)


@dataclass(frozen=True)
class ScaleSkipping:
    """Tells the blocks of one scale how many tokens to keep; the source's keep all and note what
    they give."""

    sides: tuple[int, int]
    """p of the source and of this scale."""
    num_kept: int
    first_layer: int
    measure: str
    sharing: int = 1
    """Number of equal parts of the batch that all keep the tokens which the first one chooses."""

    @property
    def num_tokens(self) -> int:
        return self.sides[1] ** 2

    def num_passing(self, layer: int) -> int:
        """Count the tokens that pass a block."""
        return self.num_kept if layer >= self.first_layer else self.num_tokens


@dataclass(frozen=True)
class Skip:
    """Runs attention and FFN of one block on the tokens that they keep."""

    scale: ScaleSkipping
    outputs: Outputs
    layer: int = 0

    def at(self, layer: int) -> Skip | None:
        """Return that of one layer; None if it skips no tokens at any scale."""
        return replace(self, layer=layer) if layer >= self.scale.first_layer else None

    def attended(
        self, attention: Callable[[Tensor], Tensor], x_RlC: Tensor, h_RlC: Tensor
    ) -> Tensor:
        """Compute attention (R, l, C) of a block's input x, which AdaLN turned into h."""
        if self._is_source:
            return self._noted("attention", attention(h_RlC))
        kept = self._largest(distances(self._choosing(x_RlC)))
        return self._completed("attention", attention(kept.take(h_RlC)), kept)

    def fed(
        self,
        ffn: nn.Module,
        x_RlC: Tensor,
        h_RlC: Tensor,
        normed_RlC: Tensor,
        routing: Routing | None,
    ) -> Tensor:
        """Compute the FFN (R, l, C) of its input x, which was normed and AdaLN turned into h."""
        if self._is_source:
            return self._noted("ffn", feed(ffn, h_RlC, normed_RlC, routing))
        scores_rKE = None
        if self.scale.measure == "router":
            assert routing is not None
            context = context_of(routing, normed_RlC)
            scores_rlE = ffn.router(self._choosing(h_RlC), context)  # type: ignore[operator]
            kept = self._largest(scores_rlE.sum(-1))
            scores_rKE = kept.take(scores_rlE)
        else:
            kept = self._largest(distances(self._choosing(x_RlC)))
        if routing is not None:
            routing = replace(routing, kept=kept, scores_bLE=scores_rKE)
        return self._completed(
            "ffn", feed(ffn, kept.take(h_RlC), kept.take(normed_RlC), routing), kept
        )

    @property
    def _is_source(self) -> bool:
        return self.scale.num_kept == self.scale.num_tokens

    def _choosing(self, x_RlC: Tensor) -> Tensor:
        return x_RlC[: len(x_RlC) // self.scale.sharing]

    def _largest(self, scores_rl: Tensor) -> Kept:
        places_rK = scores_rl.topk(self.scale.num_kept, dim=1, sorted=False).indices
        places_rK = places_rK.sort(dim=1).values
        return Kept(places_rK.repeat(self.scale.sharing, 1), self.scale.num_tokens)

    def _noted(self, part: str, out_RlC: Tensor) -> Tensor:
        self.outputs[part, self.layer] = out_RlC
        return out_RlC

    def _completed(self, part: str, out_RKC: Tensor, kept: Kept) -> Tensor:
        """Put what kept tokens gave into the source's map, resized."""
        earlier, side = self.scale.sides
        map_RCpp = self.outputs[part, self.layer].transpose(1, 2).unflatten(2, (earlier, earlier))
        resized_RCpp = F.interpolate(map_RCpp, size=(side, side), mode="area")
        return kept.put(out_RKC, resized_RCpp.flatten(2).transpose(1, 2).contiguous())


def distances(x_RlC: Tensor) -> Tensor:
    """Compute each token's squared distance from the mean of its row, (R, l), in float32."""
    x_RlC = at_least_float32(x_RlC)
    return (x_RlC - x_RlC.mean(1, keepdim=True)).square().sum(-1)
