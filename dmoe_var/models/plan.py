"""The steps of an image, which the sampler, teacher forcing and the FLOP counter walk in order.

Legend: B images, R rows of the transformer's batch (branches x images), l tokens of a step, C
width, V vocabulary, L tokens of all scales, Cvae latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from dmoe_var.models.blocks import Modulation, Vectors
from dmoe_var.models.head_skipping import Heads, HeadSkipping, metrics
from dmoe_var.models.kv_cache import GrowingCache, KVCache
from dmoe_var.models.token_skipping import Outputs, ScaleSkipping, Skip, TokenSkipping

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
    projector: Backbone
    """The model whose projections AdaLN has: the backbone, or one whose are the same."""
    projects: bool
    """Whether it computes AdaLN's projections, and does not use those of an earlier step."""
    since: int
    """The first scale whose tokens pass: si, or several pass together, masked as in training."""
    num_predicted: int
    """Tokens that it predicts, the last ones that pass; 0 if it only fills the cache."""
    skipping: ScaleSkipping | None = None
    """How its blocks skip tokens, or note their outputs for a step that does; None is neither."""
    heads: Heads | None = None
    """Which heads its blocks project; None is all."""

    def num_passing(self, layer: int) -> int:
        """Count the tokens that pass a block."""
        if self.skipping is None:
            return self.tokens.stop - self.tokens.start
        return self.skipping.num_passing(layer)

    def rule(self, rules: Mapping[int, SelectionRule]) -> SelectionRule | None:
        """Return the rule by which it selects experts, among those by scale; None if it has none
        to select."""
        return None if self.backbone.config.experts is None else rules.get(self.si)

    def mask(self) -> Tensor | None:
        """Return what each of the tokens sees of those before and beside it, (1, 1, l, L); None if
        it sees all."""
        if self.since == self.si:
            return None
        mask_11LL: Tensor = self.backbone.attn_bias_for_masking
        return mask_11LL[:, :, self.tokens, : self.tokens.stop]


class PlanOptions(TypedDict, total=False):
    """What a plan can be told; each is as in `generate`, and off if it is left out."""

    adaln_every_scale: bool
    """Whether each step computes AdaLN's projections, not just a backbone's first."""
    share_mask: bool
    """Whether all rows of an image keep the tokens that its first one chooses."""
    skipping: TokenSkipping | None
    heads: HeadSkipping | None
    first: int
    """The first scale that is predicted."""


def steps(
    backbones: Sequence[Backbone],
    cache: Backbone,
    branches: Sequence[int] | None,
    adaln_every_scale: bool = False,
    share_mask: bool = False,
    skipping: TokenSkipping | None = None,
    heads: HeadSkipping | None = None,
    first: int = 0,
) -> tuple[Step, ...]:
    """Plan one step per scale, each on its backbone, all over one cache. See `PlanOptions`.

    branches: rows per image at each scale; None is one at all. The tokens of scales before `first`
    are known and only fill the cache. They pass together, and with those of `first`, as far as one
    backbone runs them, without experts and on all heads.
    """
    shape = cache.config
    branches_S = branches or (1,) * shape.num_scales
    found: list[Step] = []
    metrics_of: dict[Backbone, Tensor] = {}
    for si, (backbone, own) in enumerate(zip(backbones, shape.scale_slices, strict=True)):
        since, start = si, own.start
        kept = None
        if heads is not None and heads.num_kept(si, shape.H) < shape.H:
            if backbone not in metrics_of:
                projections = (block.attn.proj for block in backbone.blocks)
                metrics_of[backbone] = metrics(projections, shape.H, heads.measure)
            kept = Heads(heads.num_kept(si, shape.H), metrics_of[backbone])
        if 0 < si <= first and kept is None and _joins(found[-1], backbone):
            joined = found.pop()
            since, start = joined.since, joined.tokens.start
        known = {} if adaln_every_scale else {step.backbone: step.projector for step in found}
        projector = known.get(backbone)
        if projector is None:
            others = dict.fromkeys(known.values())
            projector = next((each for each in others if backbone.projects_as(each)), None)
        predicted = own.stop - own.start if si >= first else 0
        rows, tokens = branches_S[max(si, first)], slice(start, own.stop)
        skips = None
        if skipping is not None:
            skips = skipping.at(si, shape.patch_nums, rows if share_mask else 1)
        adaln = (projector or backbone, projector is None)
        found.append(Step(si, backbone, rows, tokens, cache, *adaln, since, predicted, skips, kept))
    return tuple(found)


def _joins(step: Step, backbone: Backbone) -> bool:
    """Say whether tokens of the next scale may pass this backbone together with a step's."""
    return backbone is step.backbone and backbone.config.experts is None and step.heads is None


class Passes:
    """Carries embedded classes, AdaLN's projections, attention's vectors, the K/V cache and outputs
    for skipped tokens from step to step of a plan.

    labels_R: classes of the first step's rows, those of the conditional branch first. Rows that a
    later step leaves out are dropped for good, and so is all that belongs to a cache when the steps
    over another one begin. gradients: whether they flow through the cache, which then takes more
    memory.
    """

    def __init__(self, labels_R: Tensor, num_images: int, gradients: bool = False):
        self._labels_R = labels_R
        self._num_images = num_images
        self._gradients = gradients
        self._model: Backbone = None
        self._cond_RC: Tensor
        self._cache: KVCache | None = None
        self._modulations: dict[int, Modulation] = {}
        self._vectors: dict[int, list[Vectors]] = {}
        self._outputs: Outputs = {}

    def begin(self, step: Step) -> None:
        """Make the projections and the cache that this step is the first to need, and drop what it
        is the first to do without."""
        num_rows = step.branches * self._num_images
        fewer = num_rows < len(self._labels_R)
        self._labels_R = self._labels_R[:num_rows]
        if step.cache is not self._model:
            self._model, self._cache = step.cache, None  # frees memory
            self._modulations, self._vectors, self._outputs = {}, {}, {}
            self._cond_RC = step.cache.condition(self._labels_R)
            self._cache = GrowingCache() if self._gradients else step.cache.new_cache(num_rows)
        elif fewer:
            self._keep_rows(num_rows)
        if step.projects:
            self._modulations[id(step.projector)] = step.projector.modulation(self._cond_RC)
        if id(step.backbone) not in self._vectors:
            self._vectors[id(step.backbone)] = step.backbone.attention_vectors()

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
        mod = self._modulations[id(step.projector)]
        skip = None if step.skipping is None else Skip(step.skipping, self._outputs)
        vectors = self._vectors[id(step.backbone)]
        how = (routing, skip, step.mask(), step.num_predicted, step.heads, vectors)
        logits_RlV: Tensor = step.backbone.step(x_RlC, mod, self._cache, *how)
        return logits_RlV

    def _keep_rows(self, num_rows: int) -> None:
        self._cond_RC = self._cond_RC[:num_rows]
        self._modulations = {key: m.of_rows(num_rows) for key, m in self._modulations.items()}
        assert self._cache is not None
        self._cache.keep_rows(num_rows)
        self._outputs = {key: out[:num_rows].clone() for key, out in self._outputs.items()}
