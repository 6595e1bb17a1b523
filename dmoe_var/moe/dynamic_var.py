"""DynamicVAR: the dense VAR at most scales, the MoE VAR at the others, over one K/V cache.

Scale-awareness (DMoE-VAR, section on scale-aware routing): scales outside `moe_scales` run the
untouched pretrained model, its head included; those inside run the fine-tuned expert model, its
head included. Embeddings are the dense model's. Legend: B batch, l tokens of a scale, C width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe_var.models.kv_cache import KVCache
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.moe.layer import ExpertCounts, Routing
from dmoe_var.moe.selection import SelectionRule
from dmoe_var.sampling.tau_schedule import Tau, resolve_rules

PAPER_MOE_SCALES = (7, 8, 9)
SHARED_FIELDS = (
    "depth",
    "width",
    "num_heads",
    "num_classes",
    "patch_nums",
    "vocab_size",
    "z_channels",
    "attn_l2_norm",
)
"""What two models must have in common to share embeddings, a K/V cache and a tokenizer."""


class DynamicVAR(nn.Module):
    """Joins a dense VAR and its expert version (or, to compare with, an unsplit ReLU version)."""

    def __init__(self, dense: VAR, moe: VAR, moe_scales: Sequence[int] = PAPER_MOE_SCALES):
        super().__init__()
        for name in SHARED_FIELDS:
            theirs, ours = getattr(moe.config, name), getattr(dense.config, name)
            if theirs != ours:
                raise ValueError(f"{name}: the dense model has {ours}, the MoE model has {theirs}")
        scales = tuple(sorted(set(moe_scales)))
        last = dense.config.num_scales - 1
        if not scales or scales[0] < 0 or scales[-1] > last:
            raise ValueError(f"moe_scales={tuple(moe_scales)}: each must be within 0..{last}")
        self.dense = dense
        self.moe = moe
        self._scales = scales

    @property
    def config(self) -> VARConfig:
        """The dense model's shape; `moe.config` adds the experts'."""
        return self.dense.config

    @property
    def replaced_scales(self) -> tuple[int, ...]:
        """Scales that the second model runs."""
        return self._scales

    @property
    def moe_scales(self) -> tuple[int, ...]:
        """Scales at which experts are selected (none if the second model is not split)."""
        return self._scales if self.moe.config.experts else ()

    def backbone_at(self, si: int) -> VAR:
        """The backbone that runs scale si."""
        return self.moe if si in self._scales else self.dense

    def condition(self, labels_B: Tensor) -> Tensor:
        return self.dense.condition(labels_B)

    def embed_start(self, cond_BC: Tensor) -> Tensor:
        return self.dense.embed_start(cond_BC)

    def embed_scale(self, f_hat_BlC: Tensor, si: int) -> Tensor:
        return self.dense.embed_scale(f_hat_BlC, si)

    def new_cache(self, batch: int) -> KVCache:
        return self.dense.new_cache(batch)

    @torch.no_grad()
    def forward(
        self,
        labels_B: Tensor,
        teacher_BLC: Tensor,
        tau: Tau = None,
        selection: SelectionRule | Sequence[SelectionRule] | None = None,
        impl: str = "grouped",
        counts: ExpertCounts | None = None,
    ) -> Tensor:
        """Teacher-forced logits (B, L, V), scale by scale over the cache as in sampling.

        Without tau and selection every expert runs. teacher_BLC: (B, L - 1, Cvae). No gradients:
        the cache is written in place.
        """
        rules = resolve_rules(tau, selection, self.config.num_scales, self.moe_scales)
        self.dense.check_teacher(labels_B, teacher_BLC)
        cond_BC = self.condition(labels_B)
        cache = self.new_cache(labels_B.shape[0])
        slices = self.config.scale_slices
        modulations = {id(m): m.modulation(cond_BC) for m in (self.dense, self.moe)}
        logits = []
        for si, tokens in enumerate(slices):
            if si == 0:
                x_BlC = self.embed_start(cond_BC)
            else:
                given = slice(tokens.start - slices[0].stop, tokens.stop - slices[0].stop)
                x_BlC = self.embed_scale(teacher_BLC[:, given], si)
            routing = Routing(rules[si], si, impl, counts) if si in rules else None
            backbone = self.backbone_at(si)
            logits.append(backbone.step(x_BlC, modulations[id(backbone)], cache, routing))
        return torch.cat(logits, dim=1)
