"""The steps of an image, which the sampler, teacher forcing and the FLOP counter walk in order.

Legend: B images, R rows of the transformer's batch (branches x images), l tokens of a step, C
width, V vocabulary, L tokens of all scales, Cvae latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe_var.models.blocks import Modulation
from dmoe_var.models.kv_cache import KVCache

if TYPE_CHECKING:
    from dmoe_var.moe.routing import Routing
    from dmoe_var.moe.selection import SelectionRule


Backbone = Any
"""A `VAR`: its file imports this one."""


@dataclass(frozen=True)
class Step:
    """Describes one pass through a transformer."""

    si: int
    """The scale that it predicts, or the last one whose tokens pass."""
    backbone: Backbone
    branches: int
    """Rows per image: 1 (the conditional one) or 2 (both halves of guidance); they never grow."""
    tokens: slice
    """The tokens that pass, among all L."""
    cache: Backbone
    """The model whose embeddings its input has, and whose K/V cache it reads and writes. Steps with
    the same model share a cache, and follow one another."""
    projects: bool
    """Whether it computes AdaLN's projections, and does not use those of an earlier step."""
    since: int
    """The first scale whose tokens pass: si, or several pass together, masked as in training."""
    num_predicted: int
    """Tokens that it predicts, the last ones that pass; 0 if it only fills the cache."""

    def rule(self, rules: Mapping[int, SelectionRule]) -> SelectionRule | None:
        """Return the rule by which it selects experts, among those by scale; None if it has none
        to select."""
        return None if self.backbone.config.experts is None else rules.get(self.si)

    def run(
        self, x_RlC: Tensor, mod: Modulation, cache: KVCache, routing: Routing | None = None
    ) -> Tensor:
        """Compute the logits (R, l, V) of what it predicts, over the cache of all tokens before."""
        mask_11lL = None
        if self.since < self.si:
            mask_11lL = self.backbone.attn_bias_for_masking[:, :, self.tokens, : self.tokens.stop]
        return self.backbone.step(x_RlC, mod, cache, routing, mask_11lL, self.num_predicted)


def steps(
    backbones: Sequence[Backbone],
    cache: Backbone,
    scale_slices: Sequence[slice],
    branches: Sequence[int] | None,
    adaln_every_scale: bool,
    first: int = 0,
) -> tuple[Step, ...]:
    """Plan one step per scale, each on its backbone, all over one cache.

    branches: rows per image at each scale; None is one at all. first: the first scale that is
    predicted. The tokens of those before it are known and only fill the cache. They pass together,
    and with those of `first`, as far as one backbone without experts runs them.
    """
    branches_S = branches or (1,) * len(scale_slices)
    found: list[Step] = []
    for si, (backbone, own) in enumerate(zip(backbones, scale_slices, strict=True)):
        since, start = si, own.start
        if 0 < si <= first and backbone is found[-1].backbone and backbone.config.experts is None:
            joined = found.pop()
            since, start = joined.since, joined.tokens.start
        projects = adaln_every_scale or all(backbone is not step.backbone for step in found)
        predicted = own.stop - own.start if si >= first else 0
        rows, tokens = branches_S[max(si, first)], slice(start, own.stop)
        found.append(Step(si, backbone, rows, tokens, cache, projects, since, predicted))
    return tuple(found)


class Passes:
    """Carries embedded classes, AdaLN's projections and the K/V cache from step to step of a plan.

    labels_R: classes of the first step's rows, those of the conditional branch first. Rows that a
    later step leaves out are dropped for good, and so is all that belongs to a cache when the steps
    over another one begin.
    """

    def __init__(self, labels_R: Tensor, num_images: int):
        self._labels_R = labels_R
        self._num_images = num_images
        self._model: Backbone = None
        self._cond_RC: Tensor
        self._cache: KVCache | None = None
        self._modulations: dict[int, Modulation] = {}

    def begin(self, step: Step) -> None:
        """Make the projections and the cache that this step is the first to need, and drop what it
        is the first to do without."""
        num_rows = step.branches * self._num_images
        fewer = num_rows < len(self._labels_R)
        self._labels_R = self._labels_R[:num_rows]
        if step.cache is not self._model:
            self._model, self._cache, self._modulations = step.cache, None, {}  # frees memory
            self._cond_RC = step.cache.condition(self._labels_R)
            self._cache = step.cache.new_cache(num_rows)
        elif fewer:
            self._keep_rows(num_rows)
        if step.projects:
            self._modulations[id(step.backbone)] = step.backbone.modulation(self._cond_RC)

    def embed(self, step: Step, inputs: Mapping[int, Tensor]) -> Tensor:
        """Compute the input (R, l, C) of a step that has begun. inputs: f_hat downsampled to each
        scale that passes, (B, p*p, Cvae); scale 0 reads only the class."""
        return torch.cat(
            [
                step.cache.embed_scale(inputs[si], si).repeat(step.branches, 1, 1)
                if si
                else step.cache.embed_start(self._cond_RC)
                for si in range(step.since, step.si + 1)
            ],
            dim=1,
        )

    def run(self, step: Step, x_RlC: Tensor, routing: Routing | None = None) -> Tensor:
        """Compute the logits (R, l, V) of what a step predicts, which has begun."""
        assert self._cache is not None
        return step.run(x_RlC, self._modulations[id(step.backbone)], self._cache, routing)

    def _keep_rows(self, num_rows: int) -> None:
        self._cond_RC = self._cond_RC[:num_rows]
        self._modulations = {key: m.of_rows(num_rows) for key, m in self._modulations.items()}
        assert self._cache is not None
        self._cache.keep_rows(num_rows)
