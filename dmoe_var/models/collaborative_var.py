"""CollaborativeVAR: one model drafts the first scales, another refines the rest (CoDe, 2411.17787).

A large drafter draws the coarse scales, which are few tokens. A small refiner then reads all of
them at once, which fills its own K/V cache, and draws the fine scales, which are most tokens. The
two have the tokenizer and the classes in common, and nothing else. Legend: B batch, L tokens of all
scales, V vocabulary, Cvae latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmoe_var import values
from dmoe_var.models.dynamic_var import DynamicVAR, rules_of, teacher_forced
from dmoe_var.models.pair import IN_PAIRS
from dmoe_var.models.plan import PlanOptions, Step
from dmoe_var.models.var import VAR, Labels, VARConfig
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.selection import Selection
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.moe.tau_schedule import Tau

if TYPE_CHECKING:
    from typing_extensions import Unpack

IN_COMMON = ("num_classes", *IN_PAIRS)
"""Fields that drafter and refiner need in common."""


class CollaborativeVAR(nn.Module):
    """Draws the first `drafted_scales` scales by the drafter, and the others by the refiner.

    At the first scale of its own the refiner reads what was drafted as in training: it computes
    what it would under teacher forcing, experts at drafted scales included, and leaves out heads
    where it would have, had it drawn them. 0 drafted scales are
    the refiner alone, all of them the drafter alone. Raises ValueError if the models, or the number
    of scales, do not fit.
    """

    def __init__(self, drafter: VAR, refiner: VAR | DynamicVAR, drafted_scales: int):
        super().__init__()
        for name in IN_COMMON:
            theirs, ours = getattr(drafter.config, name), getattr(refiner.config, name)
            if theirs != ours:
                raise ValueError(f"{name}: the drafter has {theirs}, the refiner has {ours}")
        if drafter.moe_scales:
            raise ValueError("the drafter has experts; only the refiner may have them")
        self.config: VARConfig = refiner.config
        """The refiner's shape; the drafter's is `drafter.config`."""
        self.drafter = drafter
        self.refiner = refiner
        self.drafted_scales = values.whole("drafted_scales", drafted_scales, 0)
        if self.drafted_scales > self.config.num_scales:
            raise ValueError(
                f"drafted_scales={drafted_scales} must be within 0..{self.config.num_scales}"
            )

    @property
    def refines(self) -> bool:
        """Whether any scale is left to the refiner."""
        return self.drafted_scales < self.config.num_scales

    @property
    def moe_scales(self) -> tuple[int, ...]:
        """Scales at which the refiner selects experts, for tokens that it draws or reads."""
        return self.refiner.moe_scales if self.refines else ()

    @property
    def selection(self) -> Selection:
        """The refiner's own selection."""
        return self.refiner.selection if self.refines else None

    def backbone_at(self, si: int) -> VAR:
        """Return the refiner's backbone of scale si."""
        return self.refiner.backbone_at(si)

    @property
    def skipped(self) -> SkippedMeans | None:
        """What stands for experts of the refiner that do not run; None is nothing."""
        return self.refiner.skipped if self.refines else None

    def plan(
        self, branches: Sequence[int] | None = None, **options: Unpack[PlanOptions]
    ) -> tuple[Step, ...]:
        """See `VAR.plan`; drafter and refiner have a cache each. Raises ValueError if tokens are to
        be skipped: what one model gave at an earlier scale is no output of the other's."""
        skipping, heads = options.get("skipping"), options.get("heads")
        if skipping is not None and skipping.scales:
            raise ValueError(
                f"skipping.ratios={skipping.ratios}: a drafter and its refiner skip no tokens; "
                "allowed: none"
            )
        first = self.drafted_scales
        early: PlanOptions = {**options, "heads": None if heads is None else heads.before(first)}
        late: PlanOptions = {**options, "first": first}
        drafted = self.drafter.plan(branches, **early)[:first]
        return drafted + self.refiner.plan(branches, **late) if self.refines else drafted

    @torch.no_grad()
    def forward(
        self,
        labels_B: Labels,
        teacher_BLC: Tensor,
        tau: Tau = None,
        selection: Selection = None,
        impl: str = "auto",
        observer: Observer | None = None,
    ) -> Tensor:
        """Compute teacher-forced logits (B, L, V), each scale's by the model that draws it. See
        `DynamicVAR.forward`."""
        rules = rules_of(self, tau, selection)
        given = (labels_B, teacher_BLC, rules, impl, observer)
        return torch.cat(list(teacher_forced(self, *given, skipped=self.skipped)), dim=1)


AnyVAR = VAR | DynamicVAR | CollaborativeVAR
"""What the sampler draws from."""
