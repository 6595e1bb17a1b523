"""The section `selection` of a configuration: it holds the keys of all rules, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from dmoe_var.config_fields import STRICT
from dmoe_var.moe.selection.base import Key, SelectionRule, keys_of, shown_values
from dmoe_var.moe.selection.rules import RULES
from dmoe_var.moe.selection.threshold import LayerThreshold, Threshold


def _keys() -> dict[str, tuple[Any, Key]]:
    """Collect the type and declaration of every key; keys that rules share come once."""
    found: dict[str, tuple[Any, Key]] = {}
    for rule in RULES.values():
        for name, key in keys_of(rule).items():
            kind = key.by_scale or rule.declared[name]
            found.setdefault(key.name or name, (kind, key))
    return found


_RULE = f"Rule by which experts are chosen: {', '.join(RULES)}."


def _explained(default: Any, explanation: str) -> Any:
    return field(default=default, metadata={"explanation": explanation})


class _Section:
    """Checks the keys of `SelectionConfig` and builds its rules; each rule reads its own keys."""

    rule: str
    layer_tau: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        given = [list(taus) for taus in self.layer_tau]
        if given and self.rule not in (Threshold.name, LayerThreshold.name):
            raise ValueError(f"layer_tau={given} goes with rule=threshold, but rule={self.rule}")
        if self.rule == LayerThreshold.name and not given:
            raise ValueError(f"layer_tau=[] of rule={self.rule} must hold a list for each scale")

    @property
    def kind(self) -> type[SelectionRule]:
        """The class of the rule; with `layer_tau`, threshold means `LayerThreshold`."""
        return LayerThreshold if self.layer_tau else RULES[self.rule]

    def rules(self) -> SelectionRule | list[SelectionRule]:
        """Build what `generate(selection=...)` takes."""
        kind: Any = self.kind
        keys = keys_of(kind)
        given = {name: getattr(self, key.name or name) for name, key in keys.items()}
        by_scale = next((name for name, key in keys.items() if key.by_scale), None)
        if by_scale is None:
            return kind(**given)
        rules = [kind(**{**given, by_scale: each}) for each in given[by_scale]]
        return rules if len(rules) > 1 else rules[0]

    @property
    def values(self) -> str:
        """The values as text: "0.2,0.3"; by layer, ";" separates the scales."""
        rules = self.rules()
        return shown_values(rules if isinstance(rules, list) else [rules])

    @property
    def text(self) -> str:
        """The rule and its values: "threshold 0.2,0.3"."""
        return f"{self.kind.wording or self.kind.name} {self.values}".rstrip()


if TYPE_CHECKING:

    @dataclass(frozen=True, init=False)
    class SelectionConfig(_Section):
        """Declares `rule` and the keys of all rules."""

        def __init__(self, rule: str = "threshold", **keys: Any) -> None: ...
        def __getattr__(self, key: str) -> Any: ...
else:
    SelectionConfig = make_dataclass(
        "SelectionConfig",
        [
            ("rule", Literal[tuple(RULES)], _explained(Threshold.name, _RULE)),
            *((n, kind, _explained(k.default, k.explanation)) for n, (kind, k) in _keys().items()),
        ],
        bases=(_Section,),
        namespace={
            "__doc__": "Which experts run on a token; each rule reads its own keys.",
            "__module__": __name__,
            "__pydantic_config__": STRICT,
        },
        frozen=True,
    )


def recorded_selection(config: Mapping[str, Any]) -> SelectionConfig:
    """Read the section from a record's configuration, {"selection.rule": ..., ...}."""
    given = {name: config.get(f"selection.{name}") for name in ("rule", *_keys())}
    return SelectionConfig(**{key: _tuples(v) for key, v in given.items() if v is not None})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
