"""tau a scale: Eq. 3's threshold ratio, or any selection rule, for each scale with experts.

Polarity: a larger tau runs fewer experts; 0 runs all. Published lists of the authors' code use
1 - tau and are converted here, once, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe_var import values
from dmoe_var.moe.selection import Selection, SelectionRule, Threshold

Tau = float | Sequence[float] | None
"""Also an array of numpy or torch, of one value or of several."""

PAPER_TAU = (0.18161, 0.18698, 0.21314)
"""The paper's thresholds of the last three scales, in Eq. 3's polarity."""


def from_published(published: Sequence[float]) -> tuple[float, ...]:
    """Eq.-3 thresholds of a list in the polarity of the authors' code (1 - tau)."""
    return tuple(1.0 - value for value in values.numbers("published", published, 0, 1))


def resolve_rules(
    tau: Tau,
    selection: Selection,
    num_scales: int,
    moe_scales: Sequence[int],
    default: Selection = None,
) -> dict[int, SelectionRule]:
    """The rule of each scale in `moe_scales`: by tau, by selection, or else by `default`, which is
    the model's own; empty, so that every expert runs, where none of them is given.

    `tau` and `selection` are one value for all those scales, a list of one value for each of them,
    or a list of one value for every scale of the model, of which those at scales without experts
    have nothing to act on. Raises ValueError for both at once, a model without experts, a list of
    another length, or a tau outside [0, 1].
    """
    if tau is None and selection is None:
        selection = default
    if tau is None and selection is None:
        return {}
    if tau is not None and selection is not None:
        raise ValueError("tau and selection are both given; tau is short for Threshold(tau)")
    name = "selection" if tau is None else "tau"
    if not moe_scales:
        raise ValueError(f"{name} is given, but the model has no experts")
    given = _rules_of(selection) if tau is None else _thresholds(tau)
    if len(given) == 1:
        per_scale = given * len(moe_scales)
    elif len(given) == len(moe_scales):
        per_scale = given
    elif len(given) == num_scales:
        per_scale = [given[si] for si in moe_scales]
    else:
        raise ValueError(
            f"{name} has {len(given)} values; it takes 1, {len(moe_scales)} (the scales with "
            f"experts) or {num_scales} (all scales)"
        )
    return dict(zip(moe_scales, per_scale, strict=True))


def _thresholds(tau: Any) -> list[SelectionRule]:
    """Eq. 3 at a tau, or at each of a list of them."""
    allowed = "a number within [0, 1] or a list of such"
    given = [tau] if values.is_number(tau) else values.items("tau", tau, allowed)
    return [Threshold(each) for each in given]


def _rules_of(selection: Any) -> list[SelectionRule]:
    """A rule, or a list of rules."""
    given = list(selection) if isinstance(selection, list | tuple) else [selection]
    for each in given:
        if not isinstance(each, SelectionRule):
            raise ValueError(
                f"selection={values.shown(each)} must be a rule, such as Threshold(0.2) or TopK(4)"
            )
    return given
