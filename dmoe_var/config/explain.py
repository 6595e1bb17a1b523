"""Tell every key of the configuration with its default and explanation, as its dataclass has them.

A key is explained by the docstring under its field or, in a section that is made by code, by its
field's metadata ("explanation").
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

from dmoe_var.config.root import Config

DEMANDED = ("base.var", "var.depth")
"""Keys that files in configs/ demand with ???, which Hydra passes over if there is a default."""


def declared(section: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Collect the default of every key by section, but for keys that have none or are demanded.

    What follows from another key (the width of a VAR, from its depth) is None here.
    """
    found: dict[str, Any] = {}
    for field, type_ in _fields(section):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(type_):
            found[field.name] = declared(type_, f"{key}.")
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING and key not in DEMANDED:
            found[field.name] = field.default
    return found


def explanations(section: Any = Config, prefix: str = "") -> dict[str, str]:
    """Say what every key means, by dotted name; before a section's keys, what the section is."""
    found: dict[str, str] = {}
    texts = _docstrings(section)
    for field, type_ in _fields(section):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(type_):
            found[key] = " ".join((inspect.getdoc(type_) or "").partition("\n\n")[0].split())
            found |= explanations(type_, f"{key}.")
        else:
            found[key] = field.metadata.get("explanation") or texts.get(field.name, "")
    return found


def explained(values: Mapping[str, Any], reads: Collection[str]) -> str:
    """Write the keys in `reads` (sections, keys) as YAML: the value of each and what it means.

    values: all keys, section by section.
    """
    texts = explanations()
    sections = {key.rpartition(".")[0] for key in texts}
    lines: list[str] = []
    last = ""
    for key, text in texts.items():
        section, _, name = key.rpartition(".")
        if key in sections or not any(f"{key}.".startswith(f"{each}.") for each in reads):
            continue
        if section != last:
            lines += ["", f"{section}: # {texts[section]}"]
            last = section
        value = _at(values, section).get(name)
        shown = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"{'  ' if section else ''}{name}: {shown} # {text}")
    return "\n".join(lines)


def _at(values: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """Look up a section by its dotted name; {} if it is not there."""
    for name in section.split(".") if section else ():
        values = values.get(name, {})
    return values


def _fields(section: Any) -> Iterator[tuple[Any, Any]]:
    """Pair the fields of a dataclass with their types."""
    types = typing.get_type_hints(section)
    return ((field, types[field.name]) for field in dataclasses.fields(section))


def _docstrings(section: Any) -> dict[str, str]:
    """Read what stands under each field in the source of a class and of those it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        try:
            source = inspect.getsource(typing.cast(type, cls))
        except OSError:  # made by code
            continue
        (tree,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(tree, ast.ClassDef)
        for above, below in pairwise(tree.body):
            match above, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = " ".join(text.split())
    return found
