"""Write tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Write one line per row, below the heads; nothing in a cell can break the table."""
    lines = [" | ".join(map(cell, heads)), *(" | ".join(map(cell, row)) for row in rows)]
    head, *rest = (f"| {line} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(heads), *rest])


def cell(value: object) -> str:
    """Write a value so that it leaves a table whole; a list's values stand side by side."""
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
