"""The one door for values from Python: what numpy, torch and plain Python have for a number, a list
of numbers or a field of a configuration goes in, plain Python comes out.

What has no meaning (a bool as a number, a float as a class or a seed, a string, NaN, a nested list)
raises one ValueError that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math
import operator
import reprlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any, Protocol

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

SHOWN = 8
"""Values of an array that a message shows; of a larger one it says the shape."""
WIDTH = 80
"""Characters of a value that a message shows."""

_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = SHOWN
_repr.maxstring = _repr.maxother = WIDTH


def shown(value: Any) -> str:
    """A value in a message: one short line, whatever it holds."""
    if _is_array(value):
        if math.prod(value.shape) > SHOWN or isinstance(_python(value), Tensor):
            return f"(an array of shape {tuple(value.shape)})"
        value = _python(value)
    return " ".join(_repr.repr(value).split())


def is_number(value: Any) -> bool:
    """Whether a value is one number, and no list of them."""
    item = _single(value)
    return isinstance(item, Real) and not isinstance(item, bool)


def number(name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
    """A finite number of any integer or float type, within [low, high]; of an array, its one."""
    if not is_number(value):
        several = "one number, no list" if _is_list(value) else "a number"
        raise ValueError(f"{name}={shown(value)} must be {several}")
    found = float(_single(value))
    _check_range(name, found, low, high)
    if not math.isfinite(found):
        raise ValueError(f"{name}={found} must be finite")
    return found


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number of any integer type, within [low, high]; of an array, its one."""
    item = _single(value)
    if isinstance(item, bool | type) or not hasattr(item, "__index__") or _is_array(item):
        raise ValueError(f"{name}={shown(value)} must be a whole number")
    found = operator.index(item)
    _check_range(name, found, low, high)
    return found


def flag(name: str, value: Any) -> bool:
    """True or False, also as 1 or 0."""
    item = _single(value)
    if not isinstance(item, int) or item not in (0, 1):
        raise ValueError(f"{name}={shown(value)} must be true or false")
    return bool(item)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of some names."""
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}={shown(value)} is none of {', '.join(names)}")
    return value


def items(name: str, value: Any, allowed: str = "a list") -> list[Any]:
    """What a list, tuple, range or array holds, one after the other. allowed: for the message."""
    found = _python(value)
    if not _is_list(found):
        raise ValueError(f"{name}={shown(value)} must be {allowed}")
    return list(found)


def numbers(
    name: str, value: Any, low: float | None = None, high: float | None = None
) -> list[float]:
    """Finite numbers within [low, high], of a list or a one-dimensional array."""
    return [number(name, each, low, high) for each in items(name, value)]


def whole_numbers(
    name: str, value: Any, low: int | None = None, high: int | None = None
) -> list[int]:
    """Whole numbers within [low, high], at least one, of a list or a one-dimensional array."""
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
    """For `__post_init__` of a frozen dataclass: makes its fields plain Python, and checks them by
    their annotations."""
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
    return {name: TypeAdapter(hints[name], config=finite) for name in names}


class _Array(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def _is_array(value: Any) -> typing.TypeGuard[_Array]:
    """A tensor, or what speaks numpy's protocol (numpy's own scalars, jax, pandas)."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def _is_list(value: Any) -> bool:
    if _is_array(value):
        return len(value.shape) > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _python(value: Any) -> Any:
    """Arrays as numbers and lists of Python; those that hold no numbers, and all else, as given."""
    if isinstance(value, Tensor):
        numeric = not (value.is_meta or value.is_complex() or value.is_quantized)
        return value.detach().tolist() if numeric else value
    if _is_array(value):
        array = np.asarray(value)
        return array.tolist() if array.dtype.kind in "biufO" else value
    return value


def _single(value: Any) -> Any:
    """The number that an array of one holds; all else as given."""
    if not _is_array(value) or math.prod(value.shape) != 1:
        return value
    found = _python(value)
    while isinstance(found, list):
        (found,) = found
    return found


def _as_tuples(value: Any) -> Any:
    """As `_python`, with tuples for lists, tuples and ranges."""
    found = _python(value)
    if isinstance(found, list | tuple | range):
        return tuple(_as_tuples(each) for each in found)
    return found


def _check_range(name: str, value: float, low: float | None, high: float | None) -> None:
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{name}={value} is not within [{low}, {high}]")
    if low is not None and not value >= low:
        raise ValueError(f"{name}={value} must be {low} or more")
