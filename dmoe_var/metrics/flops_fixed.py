"""Trace one image for the part of its cost that does not depend on the experts chosen.

Unit: MAC, one multiply-add. Legend: R rows of the transformer's batch (1 or, with guidance, 2),
l tokens of a scale, C width, E experts, D neurons per expert, V vocabulary, Cvae latent channels,
H W latent height and width, p = patch_nums[si].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmoe_var.models import guidance
from dmoe_var.models.collaborative_var import AnyVAR
from dmoe_var.models.pair import check_pair
from dmoe_var.models.plan import Passes, PlanOptions, Step
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.router import Context
from dmoe_var.moe.selection import SelectionRule
from dmoe_var.sampling.sampler import config_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dmoe_var.metrics.flops_ops import MacsByModule

OTHER = "other"
"""word_embed, phi and the head norm's projection: measured, and left out of totals."""
FIXED_PARTS = ("qkv_proj", "attention", "ffn", "head", "adaln", OTHER)


@dataclass(frozen=True)
class ExpertCost:
    """Cost of one scale's expert FFNs and routers, all layers, for one image."""

    num_pairs: int
    """Number of (token, expert) pairs: over all layers R x l x E, without skipped tokens."""
    pair_macs: int
    """MACs per pair: 2CD."""
    router_macs: int
    """MACs of all routers, if they run."""
    num_scored: int = 0
    """Tokens whose experts a rule scores, over all layers and the rows that select."""
    width: int = 0
    num_experts: int = 0
    skipped_macs: int = 0
    """MACs of adding the means of skipped experts, if a rule selects: C per pair."""

    def score_macs(self, rule: SelectionRule) -> int:
        """Count the MACs of all scores that a rule reads, except an oracle's true norms."""
        router = self.router_macs if rule.needs_router else 0
        return router + self.num_scored * rule.score_macs(self.width, self.num_experts)


@dataclass(frozen=True)
class FixedCost:
    """Cost of one image that does not depend on the experts chosen. See `fixed_cost`."""

    branches: tuple[int, ...]
    """Rows per image in the transformer's batch, by scale: 2 with guidance, else 1."""
    macs: Mapping[str, tuple[int, ...]]
    """MACs by part (FIXED_PARTS) and scale; `ffn` counts the scales with a dense FFN."""
    decoder_macs: int
    experts: Mapping[int, ExpertCost]
    """Cost of the experts by scale, for the scales whose FFNs are split."""

    @property
    def num_scales(self) -> int:
        return len(self.macs[OTHER])


@torch.no_grad()
def fixed_cost(
    model: AnyVAR,
    vqvae: VQVAE,
    cfg: float | Sequence[float] = 1.5,
    more_smooth: bool = False,
    **options: Unpack[PlanOptions],
) -> FixedCost:
    """Trace one image through the calls that the sampler makes, on the models' own device.

    cfg, more_smooth and options: as in `generate`. It costs about as much as sampling one image.
    Raise UnknownOperatorError for an operator whose cost is not known.
    """
    check_pair(vqvae, model.config)
    config = model.config
    branches = guidance.branches(guidance.by_scale(cfg, config.num_scales))
    null_R = torch.full(branches[:1], config.num_classes, device=config_device(model))
    passes = Passes(null_R, 1)
    scales: list[Counter[str]] = [Counter() for _ in config.patch_nums]
    experts = {}
    share_mask = options.get("share_mask", False)
    for step in model.plan(branches, **options):
        si, backbone = step.si, step.backbone
        if step.projects:
            cond_RC = step.cache.condition(null_R[: step.branches])
            scales[si].update(_modulation_macs(backbone, cond_RC))
        passes.begin(step)
        macs = _step_macs(step, passes)
        macs[OTHER] = _input_macs(step, vqvae)
        if step.num_predicted and more_smooth:  # the mix of code vectors
            macs[OTHER] += config.patch_nums[si] ** 2 * config.vocab_size * config.z_channels
        if backbone.config.experts is not None:
            experts[si] = _expert_cost(step, macs["ffn"], share_mask, model.skipped is not None)
            macs["ffn"] = 0
        scales[si].update(macs)
    by_part = {part: tuple(macs[part] for macs in scales) for part in FIXED_PARTS}
    return FixedCost(branches, by_part, _decoder_macs(vqvae), experts)


def _modulation_macs(backbone: VAR, cond_RC: Tensor) -> dict[str, int]:
    """Trace AdaLN's projections: the blocks' are the part `adaln`, the head norm's is `other`."""

    def call(cond_RC: Tensor) -> tuple[Tensor, ...]:
        mod = backbone.modulation(cond_RC)
        return (*mod.blocks, mod.head)

    macs = _trace(call, cond_RC, backbone=backbone)
    head_norm = macs["backbone.head_nm"].total()
    return {"adaln": macs[""].total() - head_norm, OTHER: head_norm}


def _step_macs(step: Step, passes: Passes) -> dict[str, int]:
    """Trace blocks and head at one scale, after all earlier ones; every expert runs, and routers
    are counted elsewhere."""
    backbone, tokens = step.backbone, step.tokens
    if step.skipping is not None:
        step = replace(step, skipping=replace(step.skipping, measure="distance"))
    x_RlC = backbone.pos_start.new_zeros(
        step.branches, tokens.stop - tokens.start, backbone.config.C
    )
    macs = _trace(lambda x: passes.run(step, x), x_RlC, backbone=backbone)
    layers = range(backbone.config.depth)
    attn = sum((macs[f"backbone.blocks.{i}.attn"] for i in layers), Counter())
    attention = attn["scaled_dot_product_attention"]
    parts = {
        "qkv_proj": attn.total() - attention,
        "attention": attention,
        "ffn": sum(macs[f"backbone.blocks.{i}.ffn"].total() for i in layers),
        "head": macs["backbone.head"].total(),
    }
    rest = macs[""].total() - sum(parts.values())
    if rest:
        raise RuntimeError(f"{rest} MACs of scale {step.si} are neither attention, FFN nor head")
    return parts


def _input_macs(step: Step, vqvae: VQVAE) -> int:
    """Trace phi of the codes that a step predicts, and the projection of each scale that passes,
    except scale 0."""
    z, sides, model = vqvae.config.z_channels, vqvae.config.patch_nums, step.cache
    zeros, macs = vqvae.quantize.embedding.weight.new_zeros, 0
    if step.num_predicted:
        codes_1Cpp = zeros(1, z, sides[step.si], sides[step.si])
        spread = partial(vqvae.quantize.spread, si=step.si)
        macs += _trace(spread, codes_1Cpp, vqvae=vqvae)[""].total()

    def embed(f_hat_1CHW: Tensor, si: int) -> Tensor:
        return model.embed_scale(vqvae.quantize.next_input(f_hat_1CHW, si), si)

    f_hat_1CHW = zeros(1, z, sides[-1], sides[-1])
    for si in range(max(step.since, 1), step.si + 1):
        macs += _trace(partial(embed, si=si), f_hat_1CHW, model=model, vqvae=vqvae)[""].total()
    return macs


def _decoder_macs(vqvae: VQVAE) -> int:
    p, z = vqvae.config.patch_nums[-1], vqvae.config.z_channels
    f_hat_1CHW = vqvae.quantize.embedding.weight.new_zeros(1, z, p, p)
    return _trace(vqvae.decode_f_hat, f_hat_1CHW, vqvae=vqvae)[""].total()


def _expert_cost(
    step: Step, all_experts_macs: int, share_mask: bool, adds_means: bool
) -> ExpertCost:
    """Count pairs and router MACs of one scale. all_experts_macs: traced cost of its FFNs."""
    backbone, config = step.backbone, step.backbone.config
    passing_by_layer = [step.num_passing(layer) for layer in range(config.depth)]
    num_pairs = step.branches * sum(passing_by_layer) * config.num_experts
    pair_macs = 2 * config.C * config.hidden // config.num_experts
    if num_pairs * pair_macs != all_experts_macs:
        raise RuntimeError(
            f"{num_pairs} pairs of {pair_macs} MACs at scale {step.si}, but {all_experts_macs} ran"
        )
    selecting = 1 if share_mask else step.branches
    num_tokens = step.tokens.stop - step.tokens.start
    if step.skipping is not None and step.skipping.measure == "router":
        scored_by_layer = [num_tokens] * config.depth  # before it is known which are kept
    else:
        scored_by_layer = passing_by_layer
    x_RlC = backbone.pos_start.new_zeros(selecting, num_tokens, config.C)
    routers = nn.ModuleList(block.ffn.router for block in backbone.blocks)  # type: ignore
    null_R = torch.full((selecting,), config.num_classes, device=x_RlC.device)

    def score(x_RlC: Tensor) -> tuple[Tensor, ...]:
        each = zip(routers, scored_by_layer, strict=True)
        given = ((router, x_RlC[:, :num_scored]) for router, num_scored in each)
        return tuple(router(x_RKC, Context(x_RKC, step.si, null_R)) for router, x_RKC in given)

    macs = _trace(score, x_RlC, routers=routers)[""].total()
    scored = selecting * sum(scored_by_layer)
    skipped_macs = num_pairs * config.C if adds_means else 0
    shape = (config.C, config.num_experts)
    return ExpertCost(num_pairs, pair_macs, macs, scored, *shape, skipped_macs)


def _trace(
    call: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Tensor, **modules: nn.Module
) -> MacsByModule:
    """Call `count_macs`, imported here: only counting needs fvcore, sampling does without."""
    from dmoe_var.metrics.flops_ops import count_macs

    return count_macs(call, (x,), modules)
