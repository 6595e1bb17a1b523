"""The steps of an image, which the sampler, teacher forcing and the FLOP counter walk in order.

Legend: R rows of the transformer's batch (branches x images), l tokens of a step, C width, V
vocabulary, L tokens of all scales.
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
    """Declares what a transformer needs to run steps."""

    def modulation(self, cond_BC: Tensor) -> Modulation:
        """Compute all AdaLN projections of a condition."""

    def new_cache(self, batch: int) -> KVCache:
        """Make an empty K/V cache for all tokens of `batch` rows."""

    def step(
        self, x_BlC: Tensor, mod: Modulation, cache: KVCache, routing: Routing | None = None
    ) -> Tensor:
        """Compute the logits (B, l, V) of some tokens, over the cache of those before them."""


T = TypeVar("T", bound=Backbone)
T_co = TypeVar("T_co", bound=Backbone, covariant=True)


@dataclass(frozen=True)
class Step(Generic[T_co]):
    """Describes one pass through a transformer."""

    si: int
    """The scale that it predicts."""
    backbone: T_co
    branches: int
    """Rows per image: 1 (the conditional one) or 2 (both halves of guidance); they never grow."""
    tokens: slice
    """The tokens that pass, among all L."""
    cache: T_co
    """The model whose K/V cache it reads and writes; steps with the same model share a cache."""
    projects: bool
    """Whether it computes AdaLN's projections, and does not use those of an earlier step."""


def steps(
    backbones: Sequence[T],
    cache: T,
    scale_slices: Sequence[slice],
    branches: Sequence[int],
    adaln_every_scale: bool,
) -> tuple[Step[T], ...]:
    """Plan one step per scale, each on its backbone, all over one cache.

    branches: rows per image at each scale; a single value is that of all.
    """
    branches_S = branches if len(branches) > 1 else (*branches,) * len(scale_slices)
    found: list[Step[T]] = []
    for si, (backbone, tokens) in enumerate(zip(backbones, scale_slices, strict=True)):
        projects = adaln_every_scale or all(backbone is not step.backbone for step in found)
        found.append(Step(si, backbone, branches_S[si], tokens, cache, projects))
    return tuple(found)


class Passes:
    """Carries AdaLN's projections and the K/V caches from step to step of a plan.

    cond_RC: the condition of the first step's rows, those of the conditional branch first. Rows
    that a later step leaves out are dropped for good.
    """

    def __init__(self, cond_RC: Tensor, num_images: int):
        self._cond_RC = cond_RC
        self._num_images = num_images
        self._modulations: dict[int, Modulation] = {}
        self._caches: dict[int, KVCache] = {}

    def begin(self, step: Step[Backbone]) -> None:
        """Make the projections and the cache that this step is the first to need, and drop the
        rows that it is the first to do without."""
        if step.branches * self._num_images < len(self._cond_RC):
            self._keep_rows(step.branches * self._num_images)
        if step.projects:
            self._modulations[id(step.backbone)] = step.backbone.modulation(self._cond_RC)
        if id(step.cache) not in self._caches:
            self._caches[id(step.cache)] = step.cache.new_cache(len(self._cond_RC))

    def run(self, step: Step[Backbone], x_RlC: Tensor, routing: Routing | None = None) -> Tensor:
        """Compute the logits (R, l, V) of a step that has begun."""
        mod, cache = self._modulations[id(step.backbone)], self._caches[id(step.cache)]
        return step.backbone.step(x_RlC, mod, cache, routing)

    def _keep_rows(self, num_rows: int) -> None:
        self._cond_RC = self._cond_RC[:num_rows]
        self._modulations = {key: m.of_rows(num_rows) for key, m in self._modulations.items()}
        for cache in self._caches.values():
            cache.keep_rows(num_rows)
