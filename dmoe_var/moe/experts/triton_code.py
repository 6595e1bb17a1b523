"""Compile Triton kernels for a GPU that is not here, and count what their machine code does."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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


def compiled(kernel: Any, given: Sequence[Any], named: Mapping[str, Any], arch: int) -> Any:
    """Compile a launch as Triton would on a GPU of compute capability arch / 10: its metadata and
    machine code. given: tensors (of any device) and numbers; named: constants, then options."""
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


def disassembler() -> Path | None:
    """Find the disassembler of the Triton package; None if it has none."""
    import triton as package

    tool = Path(package.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return tool if tool.exists() else None


def disassembled(found: Any) -> str | None:
    """Return the machine code of what is `compiled`, a line per instruction or label; None without
    a `disassembler` that knows it."""
    tool = disassembler()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cubin").write_bytes(found.asm["cubin"])
        command = [str(tool), "-c", str(Path(folder) / "cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class Loop:
    """Counts a pass of a kernel's main loop, for one program."""

    instructions: int
    """Of each warp."""
    tensor_flops: int
    """Of all warps."""


def main_loop(code: str, warps: int) -> Loop:
    """Find the loop with the tensor instructions: the lines from a label to a branch back to it."""
    labels: dict[str, int] = {}
    lines = code.splitlines()
    best = Loop(0, 0)
    for place, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = place
        elif (back := re.search(r"BRA `\((\.L\w+)\)", line)) and back[1] in labels:
            body = lines[labels[back[1]] : place + 1]
            flops = sum(_tensor_flops(each, warps) for each in body)
            if flops > best.tensor_flops:
                best = Loop(sum(";" in each for each in body), flops)
    return best


def _tensor_flops(line: str, warps: int) -> int:
    """Count the operations of an instruction: HMMA is a warp's, HGMMA four warps'."""
    if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", line):
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k * warps // 4
    if shape := re.search(r"HMMA\.(\d\d)(\d)(\d\d)", line):
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k * warps
    return 0
