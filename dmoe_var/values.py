"""Check values from Python, and turn them into plain Python: numbers, lists of numbers and fields
of a configuration may come from numpy, torch or plain Python.

What has no meaning (a bool as a number, a float as a class or a seed, a string, NaN, a nested list)
raises one ValueError that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math
import operator
import reprlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from numbers import Real
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

SHOWN = 8
"""Most values of an array that a message shows; for a larger one it gives the shape."""
WIDTH = 80
"""Most characters of a value that a message shows."""

_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = SHOWN
_repr.maxstring = _repr.maxother = WIDTH


def shown(value: Any) -> str:
    """Write a value for a message, as one short line whatever it holds."""
    if _is_array(value):
        if math.prod(value.shape) > SHOWN or isinstance(_python(value), Tensor):
            return f"(an array of shape {tuple(value.shape)})"
        value = _python(value)
    return " ".join(_repr.repr(value).split())


def is_number(value: Any) -> bool:
    """Say whether a value is one number, not a list."""
    item = _single(value)
    return isinstance(item, Real) and not isinstance(item, bool)


def number(name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
    """Check a finite number of any integer or float type, or an array of one, in [low, high]."""
    if not is_number(value):
        several = "one number, no list" if is_list(value) else "a number"
        raise ValueError(f"{name}={shown(value)} must be {several}")
    found = float(_single(value))
    _check_range(name, found, low, high)
    if not math.isfinite(found):
        raise ValueError(f"{name}={found} must be finite")
    return found


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Check a whole number of any integer type, or an array of one, in [low, high]."""
    item = _single(value)
    if isinstance(item, bool | type) or not hasattr(item, "__index__") or _is_array(item):
        raise ValueError(f"{name}={shown(value)} must be a whole number")
    found = operator.index(item)
    _check_range(name, found, low, high)
    return found


def flag(name: str, value: Any) -> bool:
    """Check for True or False, which may also be 1 or 0."""
    item = _single(value)
    if not isinstance(item, int) or item not in (0, 1):
        raise ValueError(f"{name}={shown(value)} must be true or false")
    return bool(item)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Check that a value is one of the allowed names."""
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}={shown(value)} is none of {', '.join(names)}")
    return value


def instance(name: str, value: Any, kind: type) -> None:
    """Check that an argument is of a class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {type(value).__name__}, but must be a {kind.__name__}")


def items(name: str, value: Any, allowed: str = "a list") -> list[Any]:
    """List what a list, tuple, range or array holds. allowed: what the message says it must be."""
    found = _python(value)
    if not is_list(found):
        raise ValueError(f"{name}={shown(value)} must be {allowed}")
    return list(found)


def numbers(
    name: str, value: Any, low: float | None = None, high: float | None = None
) -> list[float]:
    """Check a list or one-dimensional array of finite numbers in [low, high]."""
    return [number(name, each, low, high) for each in items(name, value)]


def one_or_several(
    name: str, value: Any, low: float | None = None, high: float | None = None
) -> float | tuple[float, ...]:
    """Check one number, or a list of them, each in [low, high]; a list of one is that one."""
    if not is_list(value):
        return number(name, value, low, high)
    found = tuple(numbers(name, value, low, high))
    return found[0] if len(found) == 1 else found


def by_scale(
    name: str, value: Any, num_scales: int, low: float | None = None, high: float | None = None
) -> tuple[float, ...]:
    """Return what `one_or_several` gives at each scale: one value is that of all. Raise ValueError
    for another number of values."""
    given = one_or_several(name, value, low, high)
    if isinstance(given, float):
        return (given,) * num_scales
    if len(given) != num_scales:
        raise ValueError(
            f"{name}={shown(value)} has {len(given)} values; allowed: 1, or one for each of "
            f"{num_scales} scales"
        )
    return given


def whole_numbers(
    name: str, value: Any, low: int | None = None, high: int | None = None
) -> list[int]:
    """Check a non-empty list or one-dimensional array of whole numbers in [low, high]."""
    try:
        found = [whole(name, each) for each in items(name, value)]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"{name}={shown(value)} must be a non-empty list of whole numbers")
    for each in found:
        _check_range(name, each, low, high)
    return found


def take_fields(instance: Any) -> None:
    """Make the fields of a frozen dataclass plain Python, and check them by their annotations: in
    its `__post_init__`, or once what a file holds is in it."""
    for name, adapter in _adapters(type(instance)).items():  # type: ignore[arg-type]
        given = getattr(instance, name)
        try:
            value = adapter.validate_python(_as_tuples(given), strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ValueError(f"{name}={shown(given)}: {message}") from error
        object.__setattr__(instance, name, value)


@cache
def _adapters(cls: type) -> Mapping[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    finite = ConfigDict(allow_inf_nan=False)
    names: Iterable[str] = cls.__dataclass_fields__  # type: ignore[attr-defined]
    # A section within a section says for itself what it allows.
    configs = {name: None if is_dataclass(hints[name]) else finite for name in names}
    return {name: TypeAdapter(hints[name], config=config) for name, config in configs.items()}


def _is_array(value: Any) -> bool:
    """Say whether a value is a tensor or speaks numpy's protocol (numpy's scalars, jax, pandas)."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def is_list(value: Any) -> bool:
    """Say whether a value is a list: a sequence that is no text, or an array with dimensions."""
    if _is_array(value):
        return len(value.shape) > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _python(value: Any) -> Any:
    """Turn arrays into Python's numbers and lists; leave those without numbers, and all else."""
    if isinstance(value, Tensor):
        numeric = not (value.is_meta or value.is_complex() or value.is_quantized)
        return value.detach().tolist() if numeric else value
    if _is_array(value):
        array = np.asarray(value)
        return array.tolist() if array.dtype.kind in "biufO" else value
    return value


def _single(value: Any) -> Any:
    """Return the number that an array of one holds; leave all else as given."""
    if not _is_array(value) or math.prod(value.shape) != 1:
        return value
    found = _python(value)
    while isinstance(found, list):
        (found,) = found
    return found


def _as_tuples(value: Any) -> Any:
    """Do as `_python`, and turn lists, tuples and ranges into tuples."""
    found = _python(value)
    if isinstance(found, list | tuple | range):
        return tuple(_as_tuples(each) for each in found)
    return found


def _check_range(name: str, value: float, low: float | None, high: float | None) -> None:
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{name}={value} is not within [{low}, {high}]")
    if low is not None and not value >= low:
        raise ValueError(f"{name}={value} must be {low} or more")
