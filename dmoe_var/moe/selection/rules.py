"""The rules that configurations and stored models can name, and how models store them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dmoe_var.moe.selection.base import Selection, SelectionRule
from dmoe_var.moe.selection.by_chance import Random
from dmoe_var.moe.selection.cumulative import Cumulative
from dmoe_var.moe.selection.everything import All
from dmoe_var.moe.selection.keys import Keys
from dmoe_var.moe.selection.threshold import LayerThreshold, Oracle, Threshold
from dmoe_var.moe.selection.top_k import TopK

_LISTED = (Threshold, Oracle, TopK, Random, Cumulative, All, LayerThreshold, Keys)
RULES: dict[str, type[SelectionRule]] = {rule.name: rule for rule in _LISTED}
"""The rules by their names."""


def selection_to_json(selection: Selection) -> Any:
    """Turn rules into plain values: {"rule": name, ...}, a list of such, or None.

    Raises ValueError if a rule is none of `RULES`.
    """
    if selection is None:
        return None
    if isinstance(selection, Sequence):
        return [selection_to_json(rule) for rule in selection]
    if type(selection) not in RULES.values():
        raise ValueError(f"selection={selection!r}: its rule is none of {', '.join(RULES)}")
    return {"rule": selection.name, **asdict(selection)}


def selection_from_json(content: Any) -> Selection:
    """Read the rules that `selection_to_json` wrote; anything else is a ValueError, in one line."""
    if content is None:
        return None
    if isinstance(content, list):
        return [_rule_from_json(item) for item in content]
    return _rule_from_json(content)


def _rule_from_json(content: Any) -> SelectionRule:
    name = content.get("rule") if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(name, str) or name not in RULES:
        raise ValueError(f"selection.rule={name!r} is none of {', '.join(RULES)}")
    fields = {key: value for key, value in content.items() if key != "rule"}
    try:
        # As JSON text: there a strict adapter still takes an object for a dataclass.
        rule: SelectionRule = TypeAdapter(RULES[name]).validate_json(
            json.dumps(fields), strict=True
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("selection", *first["loc"]))
        given = "" if first["type"].startswith("missing") else f", given {first['input']!r}"
        raise ValueError(f"{where} of rule {name}: {first['msg']}{given}") from error
    return rule
