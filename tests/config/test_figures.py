"""The values of quick figures."""

from __future__ import annotations

from dmoe_var.config.figures import FiguresConfig


def test_quick_values_are_four_with_both_ends():
    values = tuple(range(9))
    assert FiguresConfig(quick=True).along(values) == (0, 3, 5, 8)
    assert FiguresConfig(quick=False).along(values) == values
    assert FiguresConfig(quick=True).along((1, 2)) == (1, 2)
    assert FiguresConfig(quick=True, seeds=(4, 5)).used_seeds == (4,)
