"""The base of selection rules: what a rule declares, and how its fields are checked.

Legend: B batch, L tokens, C width, D neurons per expert, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo
from torch import Tensor

from dmoe_var import values

Limits = tuple[bool, str, Any, Any]
"""Whether a field holds several values, and of one its type's name, the least and the most."""
Count = Annotated[int, Field(ge=1, le=2**31)]


@dataclass(frozen=True)
class Key:
    """Marks a field of a rule as a key of configurations, under `selection`."""

    default: Any
    explanation: str
    """One line for --help."""
    by_scale: Any = None
    """The key's type if it holds a value per scale; a rule may have one such key."""
    name: str | None = None
    """The key's name if it is not the field's."""


@dataclass(frozen=True)
class SelectionRule(ABC):
    """Base of all rules: a rule is a pure function of scores (..., E) to a bool mask (..., E).

    A rule's fields are annotated with their limits, and with a `Key` if configurations set them.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: ClassVar[str] = ""
    """Its name in configurations, stored models and records."""
    label: ClassVar[str] = ""
    """Its name in tables and legends."""
    wording: ClassVar[str] = ""
    """Its name in a line of text, before the values; if empty, `name` stands there."""
    colour: ClassVar[str] = "#7F7F7F"
    marker: ClassVar[str] = "."
    """Colour and marker of its curve in figures."""
    proposed: ClassVar[bool] = False
    """Whether it is the paper's method, which has its own curves in figures, and not a rival."""

    uses_scores: ClassVar[bool] = True
    """Whether the rule reads scores; if not, it is handed noise."""
    needs_router: ClassVar[bool] = True
    """Whether the scores are the router's; it then has to be trained, runs, and is counted."""
    true_norms: ClassVar[bool] = False
    """Whether the scores are the experts' true norms; the pass for them is not counted."""

    declared: ClassVar[Mapping[str, Any]] = {}
    """The annotation of each field."""
    _limits: ClassVar[tuple[tuple[str, Limits], ...]] = ()
    """What each field may hold, read once: torch.compile traces constructors, not annotations."""

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        cls.declared = {n: hint for n, hint in hints.items() if get_origin(hint) is not ClassVar}
        cls._limits = tuple((name, _limits(hint)) for name, hint in cls.declared.items())

    def __post_init__(self) -> None:
        for name, limits in self._limits:
            object.__setattr__(self, name, _checked(name, getattr(self, name), limits))

    @abstractmethod
    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        """Select by scores (..., E), or by noise for a rule that reads none: a mask (..., E)."""

    def scores(self, ffn: Any, x_BLC: Tensor, context: Any = None) -> Tensor:
        """Compute the scores that the rule selects by, (B, L, E), of a `moe.layer.MoEFFN`. context:
        a `moe.router.Context` for a router under a condition."""
        if self.true_norms:
            return ffn.true_norms(x_BLC)
        if self.needs_router:
            return ffn.router(x_BLC, context)
        return x_BLC.new_zeros((*x_BLC.shape[:-1], ffn.num_experts))

    def score_macs(self, width: int, num_experts: int) -> int:
        """Count the MACs of one token's scores, without those of a router or of true norms."""
        return 0

    def at(self, layer: int) -> SelectionRule:
        """Return the rule of one layer; most rules are the same in all layers."""
        return self

    def misfit(self, depth: int, num_experts: int) -> tuple[str, str] | None:
        """Return the field that keeps a model of `depth` layers of `num_experts` experts from
        running the rule, and what is allowed; None if it can run it."""
        return None

    def check(self, depth: int, num_experts: int) -> None:
        """Raise ValueError if a model of `depth` layers of `num_experts` experts cannot run it."""
        if found := self.misfit(depth, num_experts):
            name, allowed = found
            raise ValueError(f"{name}={values.shown(getattr(self, name))} {allowed}")


Selection = SelectionRule | Sequence[SelectionRule] | None
"""One rule for all scales with experts, a list of rules (see `resolve_rules`), or no rule."""


def keys_of(rule: type[SelectionRule]) -> Mapping[str, Key]:
    """Return the key of each field that configurations set."""
    marks = ((name, mark) for name, hint in rule.declared.items() for mark in get_args(hint))
    return {name: mark for name, mark in marks if isinstance(mark, Key)}


def _limits(declared: Any) -> Limits:
    kind, *marks = get_args(declared) if get_origin(declared) is Annotated else (declared,)
    if get_origin(kind) is tuple:
        return (True, *_limits(get_args(kind)[0])[1:])
    limits = [limit for mark in marks if isinstance(mark, FieldInfo) for limit in mark.metadata]
    low, high = (
        next((getattr(limit, bound) for limit in limits if hasattr(limit, bound)), None)
        for bound in ("ge", "le")
    )
    return False, getattr(kind, "__name__", ""), low, high


def _checked(name: str, value: Any, limits: Limits) -> Any:
    """Check a field and make it plain Python; if it holds no number, leave it as given."""
    many, kind, low, high = limits
    if many:
        each = (False, kind, low, high)
        found = [_checked(name, item, each) for item in values.items(name, value)]
        if not found:
            raise ValueError(f"{name}=() must hold at least one value")
        return tuple(found)
    if kind == "float":
        return values.number(name, value, low, high)
    return values.whole(name, value, low, high) if kind == "int" else value


def shown_values(rules: Sequence[SelectionRule]) -> str:
    """Write the values of some scales' rules: "0.2,0.3", or by layer "0.2,0.3; 0.4,0.5"."""
    held = [[getattr(rule, name) for name in keys_of(type(rule))] for rule in rules]
    nested = any(isinstance(value, tuple) for of_rule in held for value in of_rule)
    return ("; " if nested else ",").join(" ".join(map(_shown, of_rule)) for of_rule in held)


def _shown(value: Any) -> str:
    return ",".join(map(_shown, value)) if isinstance(value, tuple) else f"{value:g}"


def describe(selection: Selection) -> str:
    """Write a selection in a few words: "tau 0.1, 0.2"."""
    if selection is None:
        return "all experts"
    rules = [selection] if isinstance(selection, SelectionRule) else list(selection)
    if len({type(rule) for rule in rules}) > 1:
        return ", ".join(dict.fromkeys(map(describe, rules)))
    rule = type(rules[0])
    words = "" if rule.proposed else rule.wording or rule.name
    keys = (key.name or name for name, key in keys_of(rule).items())
    return " ".join([words, *keys, shown_values(rules).replace(",", ", ")]).strip()
