"""Types of values that several sections of the configuration hold."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Several = Field(min_length=1)
Positive = Annotated[int, Field(gt=0)]


def as_tuple(value: Any) -> Any:
    """Turn a list into a tuple, and a number into a tuple of one."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _as_taus(value: Any) -> Any:
    if isinstance(value, str):
        raise PydanticCustomError("taus", "must be a number within 0..1, or a list of such numbers")
    return as_tuple(value)


def _distinct(values: tuple[float, ...]) -> tuple[float, ...]:
    found = {f"{each:g}" if isinstance(each, float) else each for each in values}
    if len(found) != len(values):
        raise ValueError(f"{list(values)} must be distinct to six digits")
    return values


Listed = BeforeValidator(as_tuple)
"""One number may stand for a list of one."""
Distinct = AfterValidator(_distinct)
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Taus = Annotated[tuple[Share, ...], BeforeValidator(_as_taus), Several]
Index = Annotated[int, Field(ge=0)]
Scales = Annotated[tuple[Index, ...], Several]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
PathOrName = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""Where something lies: a path (`~` is the home folder), or a name that stands for one."""
