"""tau a scale: Eq. 3's threshold ratio, or any selection rule, for each scale with experts.

Polarity: a larger tau runs fewer experts; 0 runs all. Published lists of the authors' code use
1 - tau and are converted here, once, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from dmoe_var import values
from dmoe_var.moe.selection import Selection, SelectionConfig, SelectionRule, Threshold
from dmoe_var.moe.selection.base import keys_of

T = TypeVar("T")

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

    `tau` and `selection` are one value, or a list as in `by_scale`. Raises ValueError for both at
    once, a model without experts, a list of another length, or a tau outside [0, 1].
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
    return dict(zip(moe_scales, by_scale(name, given, num_scales, moe_scales), strict=True))


def by_scale(name: str, given: Sequence[T], num_scales: int, moe_scales: Sequence[int]) -> list[T]:
    """The value of each scale in `moe_scales`: of one value for all those scales, a list of one for
    each of them, or a list of one for every scale of the model, of which those at scales without
    experts have nothing to act on. ValueError for a list of another length."""
    if len(given) == 1:
        return list(given) * len(moe_scales)
    if len(given) == len(moe_scales):
        return list(given)
    if len(given) == num_scales:
        return [given[si] for si in moe_scales]
    raise ValueError(
        f"{name} has {len(given)} values; it takes 1, {len(moe_scales)} (the scales with "
        f"experts) or {num_scales} (all scales)"
    )


def check_configured(
    selection: SelectionConfig,
    num_scales: int,
    moe_scales: Sequence[int],
    depth: int,
    num_experts: int,
) -> None:
    """ValueError, which names the key, where a model of this shape cannot run the selection."""
    configured = selection.rules()
    rules = configured if isinstance(configured, list) else [configured]
    for name, key in keys_of(selection.kind).items():
        path = f"selection.{key.name or name}={_as_lists(getattr(selection, key.name or name))}"
        try:
            by_scale(path, rules, num_scales, moe_scales)
        except ValueError as error:
            allowed = ", ".join(map(str, sorted({1, len(moe_scales), num_scales})))
            raise ValueError(f"{path} must have {allowed} values") from error
        for found in (rule.misfit(depth, num_experts) for rule in rules):
            if found and found[0] == name:
                raise ValueError(f"{path} {found[1]}")


def _as_lists(value: Any) -> Any:
    return list(map(_as_lists, value)) if isinstance(value, tuple) else value


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
