"""The steps of an image: what the sampler, teacher forcing and the FLOP counter walk, in order.

Legend: R rows of the transformer's batch (branches x images), l tokens of a step, C width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from torch import Tensor

from dmoe_var.models.blocks import Modulation
from dmoe_var.models.kv_cache import KVCache

if TYPE_CHECKING:
    from dmoe_var.moe.routing import Routing


class Backbone(Protocol):
    """A transformer that runs steps."""

    def modulation(self, cond_BC: Tensor) -> Modulation:
        """All AdaLN projections of a condition."""

    def new_cache(self, batch: int) -> KVCache:
        """An empty K/V cache for all tokens of `batch` rows."""

    def step(
        self, x_BlC: Tensor, mod: Modulation, cache: KVCache, routing: Routing | None = None
    ) -> Tensor:
        """Logits (B, l, V) of some tokens, over the cache of those before them."""


T = TypeVar("T", bound=Backbone)
T_co = TypeVar("T_co", bound=Backbone, covariant=True)


@dataclass(frozen=True)
class Step(Generic[T_co]):
    """One pass through a transformer."""

    si: int
    """The scale that it predicts."""
    backbone: T_co
    branches: int
    """Rows of an image: 1, the conditional one, or 2, both halves of guidance."""
    tokens: slice
    """Those that pass, of all L."""
    cache: T_co
    """The model whose K/V cache it reads and writes; steps that name the same one share a cache."""
    projects: bool
    """AdaLN's projections are computed; elsewhere those of an earlier step of the backbone hold."""


def steps(
    backbones: Sequence[T],
    cache: T,
    scale_slices: Sequence[slice],
    branches: int,
    adaln_every_scale: bool,
) -> tuple[Step[T], ...]:
    """A step a scale, by its backbone, all over one cache."""
    found: list[Step[T]] = []
    for si, (backbone, tokens) in enumerate(zip(backbones, scale_slices, strict=True)):
        projects = adaln_every_scale or all(backbone is not step.backbone for step in found)
        found.append(Step(si, backbone, branches, tokens, cache, projects))
    return tuple(found)


class Passes:
    """What goes from step to step of a plan: AdaLN's projections and the K/V caches."""

    def __init__(self, cond_RC: Tensor):
        self._cond_RC = cond_RC
        self._modulations: dict[int, Modulation] = {}
        self._caches: dict[int, KVCache] = {}

    def begin(self, step: Step[Backbone]) -> None:
        """Make what this step is the first to need."""
        if step.projects:
            self._modulations[id(step.backbone)] = step.backbone.modulation(self._cond_RC)
        if id(step.cache) not in self._caches:
            self._caches[id(step.cache)] = step.cache.new_cache(len(self._cond_RC))

    def run(self, step: Step[Backbone], x_RlC: Tensor, routing: Routing | None = None) -> Tensor:
        """Logits (R, l, V) of a step that has begun."""
        mod, cache = self._modulations[id(step.backbone)], self._caches[id(step.cache)]
        return step.backbone.step(x_RlC, mod, cache, routing)
