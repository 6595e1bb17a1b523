"""The steps of an image, which the sampler, teacher forcing and the FLOP counter walk in order.

Legend: R rows of the transformer's batch (branches x images), l tokens of a step, C width, V
vocabulary, L tokens of all scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dmoe_var.models.blocks import Modulation
from dmoe_var.models.kv_cache import GrowingCache, KVCache
from dmoe_var.models.token_skipping import Outputs, ScaleSkipping, Skip, TokenSkipping

if TYPE_CHECKING:
    from dmoe_var.moe.routing import Routing


Backbone = Any
"""A `VAR`: its file imports this one."""


@dataclass(frozen=True)
class Step:
    """Describes one pass through a transformer."""

    si: int
    """The scale that it predicts."""
    backbone: Backbone
    branches: int
    """Rows per image: 1 (the conditional one) or 2 (both halves of guidance); they never grow."""
    tokens: slice
    """The tokens that pass, among all L."""
    cache: Backbone
    """The model whose K/V cache it reads and writes; steps with the same model share a cache."""
    projects: bool
    """Whether it computes AdaLN's projections, and does not use those of an earlier step."""
    skipping: ScaleSkipping | None = None
    """How its blocks skip tokens, or note their outputs for a step that does; None is neither."""

    def num_passing(self, layer: int) -> int:
        """Count the tokens that pass a block."""
        if self.skipping is None:
            return self.tokens.stop - self.tokens.start
        return self.skipping.num_passing(layer)


def steps(
    backbones: Sequence[Backbone],
    cache: Backbone,
    branches: Sequence[int] | None,
    adaln_every_scale: bool,
    skipping: TokenSkipping | None,
    share_mask: bool,
) -> tuple[Step, ...]:
    """Plan one step per scale, each on its backbone, all over one cache. See `VAR.plan`."""
    shape = cache.config
    branches_S = branches or (1,) * shape.num_scales
    found: list[Step] = []
    for si, (backbone, tokens) in enumerate(zip(backbones, shape.scale_slices, strict=True)):
        projects = adaln_every_scale or all(backbone is not step.backbone for step in found)
        sharing = branches_S[si] if share_mask else 1
        skips = None if skipping is None else skipping.at(si, shape.patch_nums, sharing)
        found.append(Step(si, backbone, branches_S[si], tokens, cache, projects, skips))
    return tuple(found)


class Passes:
    """Carries AdaLN's projections, the K/V caches and outputs for skipped tokens from step to step
    of a plan.

    cond_RC: the condition of the first step's rows, those of the conditional branch first. Rows
    that a later step leaves out are dropped for good. gradients: whether they flow through the
    caches, which then take more memory.
    """

    def __init__(self, cond_RC: Tensor, num_images: int, gradients: bool = False):
        self._gradients = gradients
        self._cond_RC = cond_RC
        self._num_images = num_images
        self._modulations: dict[int, Modulation] = {}
        self._caches: dict[int, KVCache] = {}
        self._outputs: Outputs = {}

    def begin(self, step: Step) -> None:
        """Make the projections and the cache that this step is the first to need, and drop the
        rows that it is the first to do without."""
        if step.branches * self._num_images < len(self._cond_RC):
            self._keep_rows(step.branches * self._num_images)
        if step.projects:
            self._modulations[id(step.backbone)] = step.backbone.modulation(self._cond_RC)
        if id(step.cache) not in self._caches:
            rows = len(self._cond_RC)
            made = GrowingCache() if self._gradients else step.cache.new_cache(rows)
            self._caches[id(step.cache)] = made

    def run(self, step: Step, x_RlC: Tensor, routing: Routing | None = None) -> Tensor:
        """Compute the logits (R, l, V) of a step that has begun."""
        mod, cache = self._modulations[id(step.backbone)], self._caches[id(step.cache)]
        skip = None if step.skipping is None else Skip(step.skipping, self._outputs)
        return step.backbone.step(x_RlC, mod, cache, routing, skip)

    def _keep_rows(self, num_rows: int) -> None:
        self._cond_RC = self._cond_RC[:num_rows]
        self._modulations = {key: m.of_rows(num_rows) for key, m in self._modulations.items()}
        for cache in self._caches.values():
            cache.keep_rows(num_rows)
        self._outputs = {key: out[:num_rows].clone() for key, out in self._outputs.items()}
