"""One tau per scale: Eq. 3's threshold ratio, or any selection rule, for each scale with experts.

A larger tau runs fewer experts; 0 runs all. Published lists of the authors' code hold 1 - tau;
`from_published` converts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from dmoe_var import values
from dmoe_var.moe.selection import Selection, SelectionConfig, SelectionRule, Threshold
from dmoe_var.moe.selection.base import keys_of

T = TypeVar("T")

Tau = float | Sequence[float] | None
"""It may also be an array of numpy or torch, with one value or several."""

PAPER_TAU = (0.18161, 0.18698, 0.21314)
"""The paper's thresholds of the last three scales, in Eq. 3's polarity."""


def from_published(published: Sequence[float]) -> tuple[float, ...]:
    """Convert a list in the polarity of the authors' code (1 - tau) to Eq. 3's thresholds."""
    return tuple(1.0 - value for value in values.numbers("published", published, 0, 1))


def resolve_rules(
    tau: Tau,
    selection: Selection,
    num_scales: int,
    moe_scales: Sequence[int],
    default: Selection = None,
) -> dict[int, SelectionRule]:
    """Return the rule of each scale in `moe_scales`, from `tau`, `selection`, or else `default`,
    the model's own. If none is given the result is empty, and every expert runs.

    `tau` and `selection` are one value, or a list as in `by_scale`. Raises ValueError if both are
    given, the model has no experts, a list has another length, or a tau is outside [0, 1].
    """
    if tau is not None and selection is not None:
        raise ValueError("tau and selection are both given; tau is short for Threshold(tau)")
    selection = default if tau is None and selection is None else selection
    if tau is None and selection is None:
        return {}
    name = "selection" if tau is None else "tau"
    if not moe_scales:
        raise ValueError(f"{name} is given, but the model has no experts")
    given = _rules_of(selection) if tau is None else _thresholds(tau)
    return dict(zip(moe_scales, by_scale(name, given, num_scales, moe_scales), strict=True))


def by_scale(name: str, given: Sequence[T], num_scales: int, moe_scales: Sequence[int]) -> list[T]:
    """Return the value of each scale in `moe_scales`. `given` holds one value for all of them, one
    per scale in `moe_scales`, or one per scale of the model; values at scales without experts are
    then unused. Raises ValueError if the list has another length."""
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
    """Raise ValueError, which names the key, if a model of this shape cannot run the selection."""
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
    """Build the rule of one tau, or the rules of a list of them."""
    allowed = "a number within [0, 1] or a list of such"
    given = [tau] if values.is_number(tau) else values.items("tau", tau, allowed)
    return [Threshold(each) for each in given]


def _rules_of(selection: Any) -> list[SelectionRule]:
    """Check a rule or a list of rules; return a list."""
    given = list(selection) if isinstance(selection, list | tuple) else [selection]
    for each in given:
        if not isinstance(each, SelectionRule):
            raise ValueError(
                f"selection={values.shown(each)} must be a rule, such as Threshold(0.2) or TopK(4)"
            )
    return given
