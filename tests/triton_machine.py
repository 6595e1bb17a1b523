"""What Triton compiles launches to, on a machine without a GPU."""

from __future__ import annotations

import re

import pytest

from dmoe_var.moe.experts.triton_code import disassembled

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of a block."""


def quick_first(quick, launches):
    """A test over launches: some, and the others marked slow, since each compiles for seconds."""
    others = [pytest.param(each, marks=pytest.mark.slow) for each in launches if each not in quick]
    return pytest.mark.parametrize("launch", [*quick, *others], ids=str)


class AnyGrid:
    """kernel[grid] of a kernel that is not run: its launch is written down."""

    def __init__(self, launches, name):
        self.launches, self.name = launches, name

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid)
        assert all(size < 1 << 16 for size in grid[1:])
        return self.launch

    def launch(self, *given, **named):
        self.launches[self.name] = (given, named)


def machine_code(found):
    """The names of its instructions."""
    code = disassembled(found)
    if code is None:
        pytest.skip("no nvdisasm in this triton package")
    return re.findall(r"\b[A-Z][A-Z0-9]+\b", code)


def no_slower_than_meant(found, code, arch):
    assert found.metadata.shared <= SHARED_MEMORY[arch]
    assert not {"LDL", "STL"} & set(code), "registers are spilled"
