"""What numpy, torch and plain Python have for a number, and what is none."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import numpy as np
import pytest
import torch
from pydantic import Field

from dmoe_var import values

THREES = [3, np.int8(3), np.uint64(3), np.array(3), np.array([[3]]), torch.tensor(3)]
THREES += [torch.tensor([3], dtype=torch.uint16), torch.tensor(3, dtype=torch.uint8)]
NO_NUMBERS = [None, "3", b"3", True, np.bool_(True), torch.tensor(True), 3j, [3], (), {3}, [[3]]]
NO_NUMBERS += [np.datetime64("2020"), np.array(["3"]), torch.empty(1, device="meta"), ...]
NO_NUMBERS += [torch.zeros(3), np.zeros((2, 2)), float]


@pytest.mark.parametrize("three", THREES, ids=repr)
def test_whole_numbers_of_any_type(three):
    found = values.whole("n", three, 0)
    assert (type(found), found) == (int, 3)
    assert values.number("n", three, 0, 5) == 3.0


@pytest.mark.parametrize("half", [np.float16(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_any_type(half):
    found = values.number("n", half)
    assert (type(found), found) == (float, 0.5)


@pytest.mark.parametrize("given", [*NO_NUMBERS, 3.0, np.float32(3), torch.tensor(3.0)], ids=repr)
def test_what_is_no_whole_number(given):
    with pytest.raises(ValueError, match=r"^seed=.* must be a whole number$"):
        values.whole("seed", given)


@pytest.mark.parametrize("given", NO_NUMBERS, ids=repr)
def test_what_is_no_number(given):
    with pytest.raises(ValueError, match=r"^tau=.* must be (a|one) number"):
        values.number("tau", given)


@pytest.mark.parametrize("given", [float("nan"), float("inf"), np.float32("-inf")])
def test_what_is_not_finite(given):
    with pytest.raises(ValueError, match=r"cfg=-?(nan|inf) must be (finite|0 or more)"):
        values.number("cfg", given, 0)


def test_ranges():
    with pytest.raises(ValueError, match=r"^tau=1.5 is not within \[0, 1\]$"):
        values.number("tau", 1.5, 0, 1)
    with pytest.raises(ValueError, match=r"^top_k=-1 must be 0 or more$"):
        values.whole("top_k", -1, 0)


LISTS = [[0, 2, 1], (0, 2, 1), range(3), np.array([0, 2, 1], np.uint16), torch.tensor([0, 2, 1])]
LISTS += [torch.tensor([0, 2, 1], dtype=torch.uint16), [np.int64(0), torch.tensor(2), 1]]


@pytest.mark.parametrize("given", LISTS, ids=repr)
def test_lists(given):
    assert values.whole_numbers("n", given) in ([0, 2, 1], [0, 1, 2])
    assert sorted(values.numbers("n", given)) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "given", [[], 3, "12", {1, 2}, [True], [1.0], [None], [[1]], np.zeros((2, 2), int), iter([1])]
)
def test_what_is_no_list_of_whole_numbers(given):
    with pytest.raises(ValueError, match=r"^labels=.* must be a non-empty list of whole numbers$"):
        values.whole_numbers("labels", given)


@pytest.mark.parametrize(
    "given", [torch.zeros(1000, 1000), np.zeros(10**6), list(range(10**6)), "x\n" * 1000]
)
def test_messages_are_one_short_line(given):
    with pytest.raises(ValueError, match=r"^seed=") as caught:
        values.whole("seed", given)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [True, 1, np.bool_(True), torch.tensor(True)])
def test_flags(given):
    assert values.flag("more_smooth", given) is True
    for wrong in ("false", 2, None, 1.0):
        with pytest.raises(ValueError, match=r"more_smooth=.* must be true or false"):
            values.flag("more_smooth", wrong)


@dataclass(frozen=True)
class Shape:
    sides: tuple[Annotated[int, Field(gt=0)], ...] = (1,)
    ratio: float = 0.5

    def __post_init__(self):
        values.take_fields(self)


def test_fields_of_a_configuration():
    shape = Shape(np.array([1, 2]), np.float32(0.25))
    assert shape == Shape([1, 2], 0.25) == Shape((1, 2), torch.tensor(0.25))
    assert [type(each) for each in (*shape.sides, shape.ratio)] == [int, int, float]
    for wrong, message in (
        ({"sides": (1, 0)}, r"sides=\(1, 0\): .*greater than 0"),
        ({"sides": (1.0,)}, r"sides=\(1.0,\): .*valid integer"),
        ({"ratio": True}, r"ratio=True: .*valid number"),
        ({"ratio": float("nan")}, r"ratio=nan: .*finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Shape(**wrong)
