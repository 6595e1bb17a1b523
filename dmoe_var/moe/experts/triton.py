"""Run ReLU experts on an NVIDIA GPU, see triton_kernels.py: fc1 gathers rows, fc2 is cuBLAS's.

`row_lists` sorts the tokens of each block into those that chose an expert and the others. `fc1`
multiplies the former by the expert's weights, and `zeros` writes zeros for the others, so that fc2
is one dense product over all neurons. At density 0.5 this takes three quarters of the dense FFN's
operations. An fc2 that skipped the zeros would have to add up its outputs in memory, expert by
expert. By estimate, for experts of 128, that takes longer than the dense product above a density
of 0.3 (H100) or 0.6 (A100), and less time below. On an H200 experts saved no time at a d16's width:
whole images took as long as dense ones.

The host never waits for the device. No buffer is sized for a worst case: hidden activations are as
large as the dense FFN's. Sums have a fixed order, so the same inputs give the same bits.

Legend: N tokens, C width, E experts, D neurons per expert, H = E D, T tokens per block.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmoe_var.errors import InputError
from dmoe_var.files import note
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.paths import ON_GPU
from dmoe_var.moe.experts.weights import ExpertWeights
from dmoe_var.ops import hooked, kernels_may_take, observed_on

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETER = "TRITON_INTERPRET"
"""Triton's own switch: with 1 its kernels run on a CPU, slowly, for tests."""
OLDEST, HOPPER = (8, 0), 9
"""Compute capabilities: the oldest one that can run, and Hopper's first number."""
MANY_TOKENS = 2048
"""From here on, half of d16's pairs fill two large tiles or more per multiprocessor."""
COLUMNS = (16, 128)
"""Fewest and most columns per tile: what tensor cores take, and what registers hold."""
LISTED = 4096
"""Mask elements that one program of `row_lists` sorts, so that they stay in registers."""


class Tile(NamedTuple):
    """Says what a program of fc1 multiplies at a time, and how.

    A list's last tile is half empty on average, so larger tiles go with longer lists.
    """

    block: int
    """Tokens per list; a list takes 16 bits per token."""
    rows: int
    columns: int
    depth: int
    stages: int
    """Tiles in shared memory: one is multiplied while the others are being loaded."""
    warps: int = 4


def tile(capability: tuple[int, int], dtype: torch.dtype, size: int, tokens: int) -> Tile:
    """Choose the tile for experts of `size` neurons on a GPU of this compute capability.

    In half precision two programs fit a multiprocessor: one multiplies while the other begins or
    ends. If tokens are few, tiles of 64 rows leave fewer multiprocessors idle.
    """
    columns = min(max(1 << (size - 1).bit_length(), COLUMNS[0]), COLUMNS[1])
    if dtype == torch.float32:
        return Tile(512, 64, min(columns, 64), depth=32, stages=3)
    if tokens < MANY_TOKENS:
        return Tile(512, 64, columns, depth=64, stages=3)
    if capability[0] == HOPPER:
        return Tile(1024, 128, columns, depth=64, stages=3)
    return Tile(1024, 128, columns, depth=32, stages=4)


@cache
def kernels() -> ModuleType | None:
    """Load triton_kernels.py; None if the triton package is missing."""
    try:
        from dmoe_var.moe.experts import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def version() -> str:
    """Return Triton's version and the source of what runs here."""
    loaded = kernels()
    assert loaded is not None
    files = (Path(str(loaded.__file__)), Path(__file__))
    return "\0".join((loaded.triton.__version__, *(file.read_text("utf-8") for file in files)))


def missing(device: torch.device) -> str | None:
    """See `paths.ComputePath`."""
    if kernels() is None:
        return "impl=triton needs the triton package, which is not installed here"
    if os.environ.get(INTERPRETER) == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        found = "AMD's" if device.type == "cuda" else f"device={device.type}"
    elif (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        found = f"one of {capability[0]}.{capability[1]}"
    else:
        reason = failure(device, "experts", _try, ON_GPU)
        return reason and f"impl=triton cannot run here: {reason}"
    return f"impl=triton needs an NVIDIA GPU of compute capability 8.0 or more, not {found}"


def _try(device: torch.device) -> None:
    row_lists(torch.ones(1, 1, dtype=torch.bool, device=device), block=512)


_FAILURES: dict[tuple[torch.device, str], str | None] = {}


def failure(
    device: torch.device, what: str, try_on: Callable[[torch.device], None], instead: str
) -> str | None:
    """Start the kernels of something once on a device, and say in one line why that failed, also on
    stderr; None if it went well. Triton needs a C compiler, among others, to start what it has
    compiled. While operators are `observed` nothing is tried, nor remembered."""
    if (device, what) not in _FAILURES and not observed_on(device):
        _FAILURES[device, what] = None
        try:
            try_on(device)
        except torch.OutOfMemoryError:
            del _FAILURES[device, what]
            raise
        except Exception as error:  # of Triton, its compilers or the system
            reason = _FAILURES[device, what] = f"{type(error).__name__}: {error}".splitlines()[0]
            note(f"Triton's kernels do not run here ({reason}); {what} run by {instead}")
    return _FAILURES.get((device, what))


def runs_on(device: torch.device) -> bool:
    """See `paths.ComputePath`. A CPU does not count, though the interpreter runs there."""
    return device.type == "cuda" and missing(device) is None


def can_run(x_NC: Tensor, weights: ExpertWeights, act: nn.Module) -> bool:
    """Say whether the kernels take these tensors: tokens and ReLU experts of one of DTYPES, without
    gradients, and with nobody watching operators or the activation. InputError if they cannot run
    on the device."""
    if reason := missing(x_NC.device):
        raise InputError(reason)
    relu = isinstance(act, nn.ReLU) and not hooked(act)
    return relu and x_NC.dtype in DTYPES and kernels_may_take(x_NC, *weights)


def run(x_NC: Tensor, dispatch: Dispatch, weights: ExpertWeights, act: nn.Module) -> Tensor:
    """See `paths.ComputePath`; the host does not wait for the lists of the kernel `row_lists`."""
    w1_EDC, b1_ED, w2_EDC, b2_C = weights
    mask_NE = dispatch.mask_NE.contiguous()
    h_NH = _hidden(x_NC.contiguous(), mask_NE, w1_EDC.contiguous(), b1_ED.contiguous())
    return torch.addmm(b2_C, h_NH, w2_EDC.flatten(0, 1))


def _hidden(x_NC: Tensor, mask_NE: Tensor, w1_EDC: Tensor, b1_ED: Tensor) -> Tensor:
    """Compute the hidden activations (N, H), 0 for experts that do not run."""
    (N, C), (E, D) = x_NC.shape, b1_ED.shape
    h_NH = x_NC.new_empty(N, E * D)
    if N == 0:
        return h_NH
    chosen = tile(_capability(x_NC.device), x_NC.dtype, D, N)
    exact = x_NC.dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
    loaded = kernels()
    assert loaded is not None
    rows, counts = row_lists(mask_NE, chosen.block)
    grid = (E * -(-D // chosen.columns), chosen.block // chosen.rows, len(counts))
    with torch.cuda.device_of(x_NC):
        loaded.zeros[grid](rows, counts, h_NH, N, E, **zeros_options(chosen, D))
        given = (x_NC, w1_EDC, b1_ED, rows, counts, h_NH, N, C, E)
        loaded.fc1[grid](*given, **fc1_options(chosen, D, exact))
    return h_NH


def zeros_options(chosen: Tile, size: int) -> dict[str, Any]:
    """Return the constants of the kernel `zeros` for experts of `size` neurons."""
    tiles = {"D": size, "T": chosen.block, "ROWS": chosen.rows, "COLUMNS": chosen.columns}
    return {**tiles, "enable_fp_fusion": True}


def fc1_options(chosen: Tile, size: int, exact: bool) -> dict[str, Any]:
    """Return the constants and options of the kernel `fc1` for experts of `size` neurons. exact:
    whether float32 is not rounded to TF32."""
    return {
        **zeros_options(chosen, size),
        "DEPTH": chosen.depth,
        "PRECISION": "ieee" if exact else "tf32",
        "num_stages": chosen.stages,
        "num_warps": chosen.warps,
    }


def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; on a CPU (the interpreter) OLDEST, which changes nothing."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST


def row_lists(mask_NE: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """List each expert's tokens per block of `block` tokens: their places in the block, int16
    (blocks, E, T), and their number, int32 (blocks, E). The block's other tokens come after."""
    N, E = mask_NE.shape
    blocks, experts = -(-N // block), LISTED // block
    rows = mask_NE.new_empty((blocks, E, block), dtype=torch.int16)
    counts = mask_NE.new_empty((blocks, E), dtype=torch.int32)
    loaded = kernels()
    assert loaded is not None
    with torch.cuda.device_of(mask_NE):
        loaded.row_lists[blocks, -(-E // experts)](
            mask_NE.view(torch.uint8), rows, counts, N, E, T=block, EXPERTS=experts,
            enable_fp_fusion=True,
        )  # fmt: skip
    return rows, counts
