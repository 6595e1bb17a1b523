"""Measure what experts would have added to the tokens that skip them, on average.

Legend: B images, R rows of the transformer's batch (branches x B), N = R l tokens of a scale, L
tokens of all scales, K layers, E experts, C width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dmoe_var.distributed import sum_over_processes
from dmoe_var.models import guidance
from dmoe_var.models.dynamic_var import DynamicVAR, rules_of, teacher_forced
from dmoe_var.moe.experts import grouped
from dmoe_var.moe.layer import MoEFFN
from dmoe_var.moe.observer import Observer, Routed
from dmoe_var.moe.selection import Selection
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.ops import widest_float


class _Sums(Observer):
    """Sums each expert's output over the tokens that skip it, and counts these, by scale."""

    def __init__(self, model: DynamicVAR):
        config, device = model.moe.config, model.moe.pos_start.device
        self.dtype = widest_float(device)
        shape = (config.depth, config.num_experts)

        def zeros(*size: int) -> dict[int, Tensor]:
            return {si: torch.zeros(size, dtype=self.dtype, device=device) for si in self.scales}

        self.scales = model.moe_scales
        self.sums_KEC, self.counts_KE = zeros(*shape, config.C), zeros(*shape)

    def on_routing(self, routed: Routed) -> None:
        si, layer, ffn = routed.si, routed.layer, routed.ffn
        assert isinstance(ffn, MoEFFN)
        skipped_NE = (~routed.mask_BLE.flatten(0, 1)).to(self.dtype)
        outputs = grouped.outputs(routed.x_BLC.flatten(0, 1), ffn.weights, ffn.act)
        for e, out_NC in enumerate(outputs):
            self.sums_KEC[si][layer, e] += skipped_NE[:, e] @ out_NC.to(self.dtype)
        self.counts_KE[si][layer] += skipped_NE.sum(0)


@torch.no_grad()
def measure_skipped_means(
    model: DynamicVAR,
    batches: Iterable[tuple[Tensor, Tensor]],
    selection: Selection = None,
    cfg: float | Sequence[float] = 1.5,
    share_mask: bool = False,
    impl: str = "auto",
) -> SkippedMeans:
    """Average each expert's output over the tokens that skip it, by scale and layer, in float32 or
    wider, on the CPU. An expert that no token skips has zeros.

    Runs the rows that the sampler runs under cfg and share_mask, teacher-forced, while nothing
    stands for what is skipped. batches: labels (B,) and teacher input (B, L - 1, Cvae). selection:
    None is the model's own. Each of several processes passes a part of the batches and gets the
    means over all. Raise ValueError if the model has no experts, or no rule is there.
    """
    rules = rules_of(model, selection=selection)
    if not rules:
        raise ValueError("means of skipped experts need experts, and a rule that skips some")
    branches = guidance.branches(guidance.by_scale(cfg, model.config.num_scales))
    sums = _Sums(model)
    for labels_B, teacher_BLC in batches:
        given = (labels_B, teacher_BLC, rules, impl, sums, branches, share_mask)
        for _ in teacher_forced(model, *given):
            pass
    sum_over_processes([*sums.sums_KEC.values(), *sums.counts_KE.values()])
    dtype = torch.promote_types(model.moe.pos_start.dtype, torch.float32)
    means = {
        si: (sums_KEC / sums.counts_KE[si].clamp_min(1)[..., None]).to("cpu", dtype)
        for si, sums_KEC in sums.sums_KEC.items()
    }
    return SkippedMeans(means, list(rules.values()))
