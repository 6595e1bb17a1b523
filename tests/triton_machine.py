"""What Triton compiles launches to, on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of a block."""
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    int: "i32",
    float: "fp32",
}


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


def compiled(kernel, given, named, arch):
    """As Triton would for this launch: its metadata and machine code."""
    import triton as package
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = dict(zip(kernel.arg_names[: len(given)], given, strict=True))
    aligned = [
        name for name, x in places.items() if name != "N" and (torch.is_tensor(x) or x % 16 == 0)
    ]
    types = {n: TYPES[x.dtype if torch.is_tensor(x) else type(x)] for n, x in places.items()}
    constants = {name: named[name] for name in kernel.arg_names[len(given) :]}
    options = {name: value for name, value in named.items() if name not in constants}
    source = ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constants,
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return package.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def machine_code(found, folder):
    import triton as package

    tool = Path(package.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not tool.exists():
        pytest.skip("no nvdisasm in this triton package")
    (folder / "cubin").write_bytes(found.asm["cubin"])
    text = subprocess.run(
        [tool, "-c", folder / "cubin"], capture_output=True, text=True, check=True
    )
    return re.findall(r"\b[A-Z][A-Z0-9]+\b", text.stdout)


def no_slower_than_meant(found, code, arch):
    assert found.metadata.shared <= SHARED_MEMORY[arch]
    assert not {"LDL", "STL"} & set(code), "registers are spilled"
