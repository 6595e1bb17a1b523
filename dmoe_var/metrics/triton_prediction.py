"""Predict the times of the Triton path on GPUs that are not here, from its compiled code.

Triton compiles for a GPU that is absent. A pass of fc1's loop takes as long as the slowest of its
tensor instructions, the instructions that its warps issue, and the bytes that it loads from the L2
cache; tensor instructions reach the share of their peak that large dense products reach. Lists,
zeros and outputs take as long as their bytes through memory. Launches, tails and full caches are
left out: these are estimates, to be held against a measurement.

Legend: N tokens, C width, H hidden width, E experts, D neurons of an expert.
"""

from __future__ import annotations

import os
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
    """Data-sheet values of a GPU, dense half precision; the L2 cache's are an A100's for all."""

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
        """Return the milliseconds that bytes take through memory."""
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
    interpreted = os.environ.get(triton.INTERPRETER) == "1"
    if triton.kernels() is None or interpreted or disassembler() is None:
        raise ConfigError(
            "benchmark.predict needs the triton package with its nvdisasm, and not its interpreter"
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
        "tensor_cycles": loop.tensor_flops / gpu.tensor_flops / DENSE_SHARE,
        "issue_cycles": loop.instructions * chosen.warps / SCHEDULERS,
        "l2_cycles": loaded * gpu.multiprocessors / gpu.l2_bytes,
    }
    # Weights and tokens pass through memory once, and so does a row of neurons for each that runs
    read, row = dtype.itemsize * (H * C + N * C), dtype.itemsize * shape.expert_size
    product = 2 * N * C * H / (DENSE_SHARE * gpu.tensor_flops)
    fc2 = max(gpu.ms(product), gpu.memory_ms(read + N * E * row))
    dense = 2 * fc2
    for density in densities:
        mask_NE = random_mask(density * E, N, E, torch.device("cpu"))
        tiles, rows = _tiles(mask_NE, chosen)
        passes = tiles * columns * -(-C // chosen.depth)
        ms = {
            "row_lists_ms": gpu.memory_ms(N * E * (1 + 2)),
            "zeros_ms": gpu.memory_ms((N * E - rows) * row),
            "fc1_ms": max(gpu.ms(passes * max(cycles.values())), gpu.memory_ms(read + rows * row)),
            "fc2_ms": fc2,
        }
        total = sum(ms.values())
        yield {
            "model": shape.model, "expert_size": shape.expert_size, "tokens": N,
            "density": density, "tile": chosen._asdict(), **cycles,
            "multiplied": tiles * chosen.rows / max(1, int(mask_NE.sum())), **ms,
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
    loop = main_loop(code, chosen.warps) if code else None
    if loop is None or loop.tensor_flops != 2 * chosen.rows * chosen.columns * chosen.depth:
        raise ConfigError(
            "benchmark.predict: this Triton compiles fc1 to code whose loop is not found"
        )
    return loop


def _tiles(mask_NE: Tensor, chosen: triton.Tile) -> tuple[int, int]:
    """Count the tiles that fc1 multiplies, and the rows of (token, expert) that it writes: those of
    its tiles that are tokens."""
    (N, E), T, rows = mask_NE.shape, chosen.block, chosen.rows
    blocks = -(-N // T)
    padded = mask_NE.new_zeros(blocks * T, E)
    padded[:N] = mask_NE
    counts_BE = padded.view(blocks, T, E).sum(1)
    tiles_BE = (counts_BE + rows - 1) // rows
    tokens_B1 = (N - T * torch.arange(blocks)[:, None]).clamp_max(T)
    return int(tiles_BE.sum()), int((tiles_BE * rows).minimum(tokens_B1).sum())
