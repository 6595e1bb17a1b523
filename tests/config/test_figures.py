"""Names of figures, and the values of quick ones."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from dmoe_var.config.figures import PAPER, FiguresConfig


def names(given):
    return TypeAdapter(FiguresConfig).validate_python({"figure": given}).names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", PAPER),
        (3, ("3",)),
        ([2, "8b"], ("2a", "2b", "8b")),
        (["rules", "all"], ("rules", *PAPER)),
        (["3", 3], ("3",)),
    ],
)
def test_names(given, expected):
    assert names(given) == expected


@pytest.mark.parametrize("given", ["13", "3a", "", [], ["3", "none"]])
def test_wrong_names(given):
    with pytest.raises(ValidationError):
        names(given)


def test_quick_values_are_four_with_both_ends():
    values = tuple(range(9))
    assert FiguresConfig(quick=True).along(values) == (0, 3, 5, 8)
    assert FiguresConfig(quick=False).along(values) == values
    assert FiguresConfig(quick=True).along((1, 2)) == (1, 2)
    assert FiguresConfig(quick=True, seeds=(4, 5)).used_seeds == (4,)
