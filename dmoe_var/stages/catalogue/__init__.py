"""Every figure by its name: each is a function that makes it of an experiment, in one of the files
here, which are all read."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Sequence
from importlib import import_module

from dmoe_var.errors import ConfigError
from dmoe_var.stages.catalogue.figure import MADE_BY

for _file in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")


def _place(name: str) -> tuple[bool, int, str]:
    """Return where a figure stands: the paper's, which have numbers, come first."""
    number, letter = re.fullmatch(r"(\d*)(.*)", name, re.S).groups()  # type: ignore[union-attr]
    return not number, int(number or 0), letter


FIGURES = {name: MADE_BY[name] for name in sorted(MADE_BY, key=_place)}
PAPER = tuple(name for name in FIGURES if name[0].isdigit())
"""The figures of the paper (2a and 11: samples; 2b and 12: experts over the picture)."""


def named(given: Sequence[str]) -> tuple[str, ...]:
    """List the figures of some names, each once: `all` is the paper's, 2 is 2a and 2b. Raise
    ConfigError if one is no figure."""
    found: list[str] = []
    for name in given:
        those = [each for each in PAPER if name in ("all", each.rstrip("ab"))]
        if name in FIGURES:
            those = [name]
        if not those:
            allowed = ", ".join(("all", *FIGURES))
            raise ConfigError(f"figures.figure={name}: no figure; allowed: {allowed}")
        found += those
    return tuple(dict.fromkeys(found))
