"""Find the temperatures at which experts' predictions are as sharp as the dense model's (beyond the
paper).

Experts that do not run leave a model less sure of the next token: its predictions spread. Guidance,
which multiplies what the experts change, widens this. A temperature takes it back at no cost: at
each sparse scale the one at which the guided predictions have the dense model's mean entropy, under
teacher forcing.

Legend: B images, L tokens, V vocabulary, l tokens of a scale, S scales, G temperatures of GRID.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dmoe_var.calibration.losses import TeacherForced
from dmoe_var.errors import InputError
from dmoe_var.models.dynamic_var import DynamicVAR, rules_of, teacher_forced
from dmoe_var.models.guidance import guide
from dmoe_var.moe.selection import SelectionRule

GRID = np.linspace(0.7, 1.3, 31)
"""Temperatures at which entropy is measured; between two of them it is taken for a line."""


def entropy(logits_BlV: Tensor) -> Tensor:
    """Compute the mean entropy of the predictions, nats."""
    log_p = logits_BlV.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


@torch.no_grad()
def temperatures(
    model: DynamicVAR,
    images: TeacherForced,
    rules: Sequence[SelectionRule],
    strengths_S: Sequence[float],
    impl: str,
    share_mask: bool = False,
) -> tuple[float, ...]:
    """Find the temperature of each scale, 1 where no experts run.

    strengths_S: how strongly each scale is guided. share_mask: whether both halves run the
    conditional half's experts, as in sampling. Raise InputError for a scale whose entropy no
    temperature of GRID matches.
    """
    scales, null = model.moe_scales, model.config.num_classes
    by_scale, branches = rules_of(model, selection=list(rules)), [2] * model.config.num_scales
    tokens_of = {step.si: step.tokens for step in model.plan()}
    wanted, found = dict.fromkeys(scales, 0.0), {si: np.zeros(len(GRID)) for si in scales}
    for labels_B, teacher_BLC, _ in images.batches():
        labels_R = torch.cat([labels_B, torch.full_like(labels_B, null)])
        teacher_RLC = teacher_BLC.repeat(2, 1, 1)
        dense_RLV = model.dense(labels_R, teacher_RLC)
        given = (labels_B, teacher_BLC, by_scale, impl, None, branches, share_mask)
        ours_RLV = torch.cat([*teacher_forced(model, *given)], dim=1)
        for si in scales:
            joined: Callable[[Tensor], Tensor] = partial(guide, t=strengths_S[si])
            tokens, share = tokens_of[si], len(labels_B)
            wanted[si] += share * float(entropy(joined(dense_RLV[:, tokens])))
            guided = joined(ours_RLV[:, tokens])
            found[si] += [share * float(entropy(guided / t)) for t in GRID]
    chosen = {si: _matching(si, wanted[si], found[si]) for si in scales}
    return tuple(chosen.get(si, 1.0) for si in range(model.config.num_scales))


def _matching(si: int, wanted: float, found_G: np.ndarray) -> float:
    """Return the temperature whose entropy is wanted; entropy rises with it."""
    if not found_G[0] <= wanted <= found_G[-1]:
        raise InputError(
            f"calibrate.temperature=true: none from {GRID[0]:g} to {GRID[-1]:g} gives scale {si} "
            "the entropy of the dense model's predictions; allowed: false"
        )
    return round(float(np.interp(wanted, found_G, GRID)), 4)
