"""Turn what a script composes into `Config`, with one line for the first thing that is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dmoe_var.config.root import Config
from dmoe_var.errors import ConfigError


def parse_config(content: Mapping[str, Any]) -> Config:
    """Make `Config` from a nested mapping. Raise ConfigError in one line for the first fault."""
    try:
        return TypeAdapter(Config).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def describe(error: ValidationError) -> str:
    """Describe an error in one line: the key, its value, what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if first["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key; {known_keys(first['loc'][:-1], str(first['loc'][-1]))}"
    if first["type"].startswith("missing"):
        given = f" in {first['input']!r}" if isinstance(first["input"], list) else ""
        return f"{key}: missing{given}"
    if first["type"] == "value_error":
        return _naming(key, message)
    return f"{key}={first['input']!r}: {message}"


def _naming(key: str, message: str) -> str:
    """Put the key before a message of its section, or of its own, that may begin with its name."""
    name, equals, _ = message.partition("=")
    for section in (key, key.rpartition(".")[0]):
        if equals and section and is_declared(f"{section}.{name}"):
            return f"{section}.{message}"
    return f"{key}: {message}" if key else message


def is_text(key: str) -> bool:
    """Tell whether the value of a dotted key is text alone (a path, a name), or null."""
    type_ = _type_of(key.split("."))
    union = typing.get_origin(type_) in (typing.Union, types.UnionType)
    return {*(typing.get_args(type_) if union else [type_])} - {types.NoneType} == {str}


def is_declared(key: str) -> bool:
    """Tell whether there is such a key or section."""
    return _type_of(key.split(".")) is not None


def is_users_own(key: str) -> bool:
    """Tell whether a dotted key is a section of the user's own keys, or lies in one (sweep.lists,
    sweep.lists.mine)."""
    path = key.split(".")
    return any(typing.get_origin(_type_of(each)) is Mapping for each in (path, path[:-1]))


def _type_of(path: Sequence[Any]) -> Any:
    """Find the type that a key is declared with; None for an unknown one."""
    found: Any = Config
    for part in path:
        if dataclasses.is_dataclass(found):
            found = typing.get_type_hints(found).get(str(part))
        elif typing.get_origin(found) is Mapping:
            found = typing.get_args(found)[1]
        else:
            return None
    return found


def known_keys(path: tuple[Any, ...], wrong: str) -> str:
    """Say what a section allows, the likeliest meant key first."""
    section = _type_of(path)
    if not dataclasses.is_dataclass(section):
        return "it takes no keys"
    names = [f.name for f in dataclasses.fields(section)]
    close = difflib.get_close_matches(wrong, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"
