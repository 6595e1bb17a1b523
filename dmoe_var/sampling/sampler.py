"""The sampler: scale by scale, with guidance, over a dense, expert or dynamic VAR.

Legend: B images, R rows of the transformer's batch (2B with guidance: [cond; null]), l tokens of
a scale, C width, V vocabulary, Cvae latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Literal, ParamSpec

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from dmoe_var.models.var import VAR, Modulation, check_pair
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.moe.layer import ExpertCounts, Routing
from dmoe_var.moe.selection import SelectionRule
from dmoe_var.sampling.tau_schedule import Tau, resolve_rules
from dmoe_var.sampling.token_sampling import (
    ImageStreams,
    draw_tokens,
    filter_logits,
    guide,
    soft_mix,
)

if TYPE_CHECKING:
    from dmoe_var.metrics.part_timing import PartClock

OnScale = Callable[[int, Tensor], None]
P = ParamSpec("P")


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn; the defaults are the published ones. batch_size moves an image by
    rounding only; dtype is that of the models' weights and products."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    cfg: Annotated[float, Field(ge=0)] = 1.5
    top_k: Annotated[int, Field(ge=0)] = 900
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.96
    more_smooth: bool = False
    batch_size: Annotated[int, Field(gt=0)] = 128
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def check_labels(labels: Sequence[int] | Tensor, num_classes: int, device: torch.device) -> Tensor:
    """Labels as LongTensor (B,); ValueError outside 0..num_classes (the last is the null class)."""
    labels_B = torch.as_tensor(labels, device=device)
    if labels_B.ndim != 1 or labels_B.numel() == 0 or labels_B.is_floating_point():
        raise ValueError("labels must be a non-empty list of whole numbers")
    if labels_B.min() < 0 or labels_B.max() > num_classes:
        raise ValueError(
            f"labels must be within 0..{num_classes} ({num_classes} is the null class), got "
            f"{int(labels_B.min())}..{int(labels_B.max())}"
        )
    return labels_B.long()


def _in_eval_mode(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Samples without drop path, whatever mode the model is in, and leaves it in that mode."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        model = args[0] if args else kwargs["model"]
        assert isinstance(model, torch.nn.Module)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            return function(*args, **kwargs)
        finally:
            for module, training in modes.items():
                module.training = training

    return wrapped


@_in_eval_mode
@torch.inference_mode()
def generate(
    model: VAR | DynamicVAR,
    vqvae: VQVAE,
    labels: Sequence[int] | Tensor,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
    tau: Tau = None,
    selection: SelectionRule | Sequence[SelectionRule] | None = None,
    generator: torch.Generator | None = None,
    start_index: int = 0,
    more_smooth: bool = False,
    impl: str = "grouped",
    adaln_every_scale: bool = False,
    counts: ExpertCounts | None = None,
    on_scale: OnScale | None = None,
    clock: PartClock | None = None,
) -> Tensor:
    """Images (B, 3, R, R) in [0, 1] of the given classes.

    Every image draws from its own stream, a hash of `seed` and of `start_index` plus its place in
    the batch, so that neither batch size nor sharding changes an image but by rounding; with
    `generator` all draws come from that one generator in the published order.

    tau, selection: see `resolve_rules`; without both the model's own `selection`, and without that
    every expert runs. cfg = 0 switches guidance off, and with it the unconditional branch.
    adaln_every_scale recomputes AdaLN's projections at each scale, as the published sampler does,
    instead of once an image. `counts` collects the experts run; `on_scale(si, f_hat_BCHW)` sees
    what has been drawn after each scale; `clock` measures where the time goes, see
    `metrics.part_timing`.
    """
    mark = _unmeasured if clock is None else clock.mark
    config = model.config
    check_pair(vqvae, config)
    _check_ranges(cfg, top_k, top_p, start_index)
    device = config_device(model)
    labels_B = check_labels(labels, config.num_classes, device)
    rules = resolve_rules(tau, selection, config.num_scales, model.moe_scales, model.selection)
    guided = cfg != 0
    branches = 2 if guided else 1
    null_B = torch.full_like(labels_B, config.num_classes)
    labels_R = torch.cat([labels_B, null_B]) if guided else labels_B

    streams = ImageStreams(seed, start_index, len(labels_B), device, generator)
    noise = partial(streams.routing_noise, branches=branches)
    mark("embedding", 0)
    cond_RC = model.condition(labels_R)
    cache = model.new_cache(len(labels_R))
    modulations: dict[int, Modulation] = {}
    x_RlC = model.embed_start(cond_RC)
    f_hat_BCHW = torch.zeros((), device=device)
    last = config.num_scales - 1
    for si in range(config.num_scales):
        backbone = model.backbone_at(si)
        if adaln_every_scale or id(backbone) not in modulations:
            modulations[id(backbone)] = backbone.modulation(cond_RC)
        inside = clock if clock is not None and clock.told_apart else None
        routing = Routing(rules[si], si, impl, counts, noise, inside) if si in rules else None
        mark("transformer", si)
        logits_RlV = backbone.step(x_RlC, modulations[id(backbone)], cache, routing)
        mark("sampling", si)
        progress = si / last
        logits_BlV = guide(logits_RlV, cfg * progress) if guided else logits_RlV
        logits_BlV = filter_logits(logits_BlV, top_k, top_p)
        codes_BCpp = _draw_codes(logits_BlV, vqvae, si, progress, streams, more_smooth)
        mark("quantiser", si)
        f_hat_BCHW = f_hat_BCHW + vqvae.quantize.spread(codes_BCpp, si)
        if on_scale is not None:
            on_scale(si, f_hat_BCHW)
        if si != last:
            f_hat_BlC = vqvae.quantize.next_input(f_hat_BCHW, si + 1)
            mark("embedding", si + 1)
            x_RlC = model.embed_scale(f_hat_BlC, si + 1).repeat(branches, 1, 1)
    mark("decoder")
    return (vqvae.decode_f_hat(f_hat_BCHW) + 1) / 2


def _unmeasured(part: str, scale: int | None = None) -> None:
    """The mark of no clock."""


def _check_ranges(cfg: float, top_k: int, top_p: float, start_index: int) -> None:
    if not (math.isfinite(cfg) and cfg >= 0):
        raise ValueError(f"cfg={cfg} must be finite and 0 or more")
    if top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"top_k={top_k} must be 0 or more, top_p={top_p} within [0, 1]")
    if start_index < 0:
        raise ValueError(f"start_index={start_index} must be 0 or more")


def _draw_codes(
    logits_BlV: Tensor,
    vqvae: VQVAE,
    si: int,
    progress: float,
    streams: ImageStreams,
    more_smooth: bool,
) -> Tensor:
    """Code vectors (B, Cvae, p, p) of one scale."""
    tokens_Bl = draw_tokens(logits_BlV, streams)
    if not more_smooth:
        return vqvae.quantize.lookup(tokens_Bl, si)
    # The published sampler draws the tokens in this mode too, which moves its generator on.
    mix_BlC = soft_mix(logits_BlV, vqvae.quantize.embedding.weight, progress, streams)
    p = vqvae.config.patch_nums[si]
    return mix_BlC.transpose(1, 2).unflatten(2, (p, p))


def config_device(model: torch.nn.Module) -> torch.device:
    """The device that a model's parameters are on."""
    return next(model.parameters()).device
