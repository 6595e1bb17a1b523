"""Tables whose cells cannot break them."""

from __future__ import annotations

from dmoe_var.markdown import table


def test_table():
    rows = [("a | b", 1), ("two\nlines", (0.5, "x")), ("", [])]
    assert table(["name", "value"], rows).splitlines() == [
        "| name | value |",
        "|---|---|",
        "| a \\| b | 1 |",
        "| two lines | 0.5, x |",
        "|  |  |",
    ]
    assert table(["name"], []) == "| name |\n|---|"
