"""Predict the times of the Triton path on GPUs that are not here, from its compiled code.

Triton compiles for a GPU that is absent. A pass of fc1's loop takes as long as the slowest of its
tensor instructions, the instructions that its warps issue, and the bytes that it loads from the L2
cache. Lists, zeros and outputs take as long as their bytes through memory, dense products as their
operations at a share of the peak. Launches, tails and full caches are left out, so these are
lower limits, to be held against a measurement.

Legend: N tokens, C width, H hidden width, E experts, D neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmoe_var.errors import ConfigError
from dmoe_var.metrics.kernel_timing import Shape
from dmoe_var.moe.experts import triton
from dmoe_var.moe.experts.triton_code import Loop, compiled, disassembled, disassembler, main_loop
from dmoe_var.moe.selection import random_mask

SCHEDULERS = 4
"""Of a multiprocessor; each issues an instruction of a warp per cycle."""
DENSE_SHARE = 0.8
"""Of the peak that a large dense product reaches: 0.81 on an H200 (fc2 of a d16, 32,768 tokens)."""


@dataclass(frozen=True)
class GPU:
    """Data-sheet values of a GPU, dense half precision."""

    capability: tuple[int, int]
    multiprocessors: int
    gigahertz: float
    tensor_flops: int
    """Per cycle and multiprocessor, two per multiply-add."""
    l2_bytes: int
    """Per cycle, of all multiprocessors."""
    gbytes_per_s: float

    @property
    def arch(self) -> int:
        return 10 * self.capability[0] + self.capability[1]

    def ms(self, cycles: float) -> float:
        """Return the milliseconds that cycles of all multiprocessors together take."""
        return cycles / self.multiprocessors / self.gigahertz / 1e6

    def memory_ms(self, bytes_: float) -> float:
        return bytes_ / self.gbytes_per_s / 1e6


GPUS: Mapping[str, GPU] = {
    "a100": GPU((8, 0), 108, 1.41, 2048, 5120, 2039),
    "h100": GPU((9, 0), 132, 1.83, 4096, 5120, 3350),
    "h200": GPU((9, 0), 132, 1.83, 4096, 5120, 4800),
}


def check_predictable(dtype: str) -> None:
    """Raise ConfigError if nothing can be predicted: in float32 there are no tensor instructions,
    and Triton and its disassembler are needed."""
    if dtype == "float32":
        raise ConfigError(
            "benchmark.predict: sampling.dtype=float32 has no tensor instructions; allowed: "
            "bfloat16"
        )
    if triton.kernels() is None or disassembler() is None:
        raise ConfigError(
            "benchmark.predict needs the triton package with its nvdisasm, not found here"
        )


def predicted(
    shape: Shape, densities: Sequence[float], dtype: torch.dtype, gpu: GPU
) -> Iterator[dict[str, Any]]:
    """Predict a row per density, with random masks: the milliseconds of each kernel, of all, and of
    the dense FFN, and `time_ratio`, the path's to the dense FFN's. Router and threshold are left
    out. The dtype is one that `check_predictable` passes."""
    chosen = triton.tile(gpu.capability, dtype, shape.expert_size, shape.tokens)
    loop = _loop(shape, chosen, dtype, gpu)
    N, C, H, E = shape.tokens, shape.width, shape.hidden, shape.num_experts
    columns = -(-shape.expert_size // chosen.columns)
    loaded = (chosen.rows + chosen.columns) * chosen.depth * dtype.itemsize
    cycles = {
        "tensor_cycles": loop.tensor_flops / gpu.tensor_flops,
        "issue_cycles": loop.instructions * chosen.warps / SCHEDULERS,
        "l2_cycles": loaded * gpu.multiprocessors / gpu.l2_bytes,
    }
    product = 2 * N * C * H / (DENSE_SHARE * gpu.tensor_flops)
    fc2 = max(gpu.ms(product), gpu.memory_ms(dtype.itemsize * (N * H + H * C + N * C)))
    dense = 2 * fc2
    for density in densities:
        mask_NE = random_mask(density * E, N, E, torch.device("cpu"))
        running, idle, rows = _tiles(mask_NE, chosen)
        passes = running * columns * -(-C // chosen.depth)
        written = dtype.itemsize * shape.expert_size
        ms = {
            "row_lists_ms": gpu.memory_ms(N * E * (1 + 2)),
            "zeros_ms": gpu.memory_ms(idle * chosen.rows * written),
            "fc1_ms": max(
                gpu.ms(passes * max(cycles.values())),
                gpu.memory_ms(running * chosen.rows * written),
            ),
            "fc2_ms": fc2,
        }
        total = sum(ms.values())
        yield {
            "model": shape.model, "expert_size": shape.expert_size, "tokens": N,
            "density": density, "tile": chosen._asdict(), **cycles,
            "multiplied": running * chosen.rows / max(1, rows), **ms,
            "dense_ms": dense, "ms": total, "time_ratio": total / dense,
        }  # fmt: skip


def _loop(shape: Shape, chosen: triton.Tile, dtype: torch.dtype, gpu: GPU) -> Loop:
    kernels = triton.kernels()
    assert kernels is not None
    N, C, E, D = shape.tokens, shape.width, shape.num_experts, shape.expert_size

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    lists = empty(1, E, chosen.block, dtype=torch.int16), empty(1, E, dtype=torch.int32)
    given = (empty(N, C), empty(E, D, C), empty(E, D), *lists, empty(N, E * D), N, C, E)
    found = compiled(kernels.fc1, given, triton.fc1_options(chosen, D, exact=True), gpu.arch)
    code = disassembled(found)
    assert code is not None
    return main_loop(code, chosen.warps)


def _tiles(mask_NE: Tensor, chosen: triton.Tile) -> tuple[int, int, int]:
    """Count the tiles of rows that run, those that are zeros alone, and the rows that run."""
    N, E = mask_NE.shape
    blocks = -(-N // chosen.block)
    padded = mask_NE.new_zeros(blocks * chosen.block, E)
    padded[:N] = mask_NE
    counts_BE = padded.view(blocks, chosen.block, E).sum(1)
    running = int(counts_BE.add(chosen.rows - 1).div(chosen.rows, rounding_mode="floor").sum())
    tiles = E * -(-N // chosen.rows)
    return running, max(0, tiles - running), int(counts_BE.sum())
