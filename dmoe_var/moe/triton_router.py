"""Run a router and Eq. 3 on an NVIDIA GPU in one kernel each, see triton_router_kernels.py.

Operator by operator they are a dozen short kernels, which by estimate take about a tenth of a d16's
dense FFN. Here the hidden layer stays in registers, so that the tokens pass through memory once:
32,768 of them are 67 MB, which an H200 reads in 14 us, 2 % of the dense FFN's time. Sums are
float32, and hidden values and scores are rounded once each.

No GPU has run these kernels yet: their values are tested by Triton's interpreter, in float16, and
the machine code of their launches is examined.

Legend: N tokens, C width, R hidden neurons of the router, E experts.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dmoe_var.moe.experts import triton
from dmoe_var.ops import kernels_may_take

HALVES = (torch.float16, torch.bfloat16)
WIDEST = 128
"""Most hidden neurons: a token's stay in registers."""
NARROWEST = 16
"""Fewest columns of a product that tensor cores take."""
EXPERTS = 32
"""Scores that `scores` computes at a time."""
COMPARED = 4096
"""Scores that one program of `threshold` compares, so that they stay in registers."""
MANY_TOKENS = 16384
"""From here on, tiles of 128 tokens keep all multiprocessors busy."""


@cache
def kernels() -> ModuleType:
    """Load triton_router_kernels.py."""
    from dmoe_var.moe import triton_router_kernels

    return triton_router_kernels


def _runs_here(x: Tensor) -> bool:
    """Say whether the kernels run on x's device: a GPU, or anything by Triton's interpreter, which
    multiplies the bits of bfloat16 as if they were whole numbers."""
    if os.environ.get(triton.INTERPRETER) == "1":
        return x.dtype != torch.bfloat16 and triton.missing(x.device) is None
    return (
        x.is_cuda
        and triton.missing(x.device) is None
        and triton.failure(x.device, "routers", _try, "torch's operators") is None
    )


def _try(device: torch.device) -> None:
    x_11 = torch.ones(1, 1, dtype=torch.float16, device=device)
    threshold(scores(x_11, x_11, x_11), 0.5)


def knows_router(x: Tensor, fc1_RC: Tensor, fc2_ER: Tensor) -> bool:
    """Say whether `scores` takes these tensors: half precision on a GPU, without gradients, and
    with nobody watching operators."""
    if not kernels_may_take(x, fc1_RC, fc2_ER) or x.dtype not in HALVES:
        return False
    return fc2_ER.shape[1] == len(fc1_RC) <= WIDEST and _runs_here(x)


def scores(x: Tensor, fc1_RC: Tensor, fc2_ER: Tensor) -> Tensor:
    """Compute |fc2 GELU(fc1 x)|, (..., E), for tokens x (..., C) that it `knows_router`."""
    x = x.contiguous()
    (*others, C), (E, R) = x.shape, fc2_ER.shape
    found = x.new_empty((*others, E))
    N = x.numel() // C
    rows = 64 if N < MANY_TOKENS else 128
    with torch.cuda.device_of(x):
        kernels().scores[(-(-N // rows),)](
            x, fc1_RC.contiguous(), fc2_ER.contiguous(), found, N, C, R, E,
            ROWS=rows, HIDDEN=max(_power(R), NARROWEST), EXPERTS=EXPERTS, DEPTH=64,
            num_stages=3, num_warps=rows // 16, enable_fp_fusion=True,
        )  # fmt: skip
    return found


def knows(scores: Tensor) -> bool:
    """Say whether `threshold` takes these scores: on a GPU, with nobody watching operators."""
    if not kernels_may_take(scores) or scores.dtype not in triton.DTYPES:
        return False
    return _power(scores.shape[-1]) <= COMPARED and _runs_here(scores)


def threshold(scores: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Apply Eq. 3 to scores (..., E) that it `knows`: the mask, and whether all are finite."""
    scores = scores.contiguous()
    E = scores.shape[-1]
    N, rows = scores.numel() // E, COMPARED // _power(E)
    blocks = -(-N // rows)
    mask = scores.new_empty(scores.shape, dtype=torch.bool)
    finite = scores.new_empty((blocks,), dtype=torch.bool)
    with torch.cuda.device_of(scores):
        kernels().threshold[(blocks,)](
            scores, mask.view(torch.uint8), finite.view(torch.uint8), N, E, tau,
            ROWS=rows, EXPERTS=_power(E), enable_fp_fusion=True,
        )  # fmt: skip
    return mask, finite.all()


def _power(number: int) -> int:
    """Round up to a power of two."""
    return 1 << (number - 1).bit_length()
