"""The router's Triton kernels without a GPU: the machine code that their launches are compiled to.
What they compute is tested by triton_values.py."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_machine import SHARED_MEMORY, machine_code, no_slower_than_meant, quick_first

from dmoe_var.moe import triton_router
from dmoe_var.moe.experts import triton
from dmoe_var.moe.experts.triton_code import compiled

needs_triton = pytest.mark.skipif(triton.kernels() is None, reason="no triton package here")
FEW, MANY = 512, triton_router.MANY_TOKENS
QUICK = [(80, torch.float16, 128, MANY), (90, torch.bfloat16, 128, FEW)]
"""The published routers; compiling takes seconds each."""
LAUNCHES = [
    (arch, dtype, hidden, tokens)
    for arch in SHARED_MEMORY
    for dtype in triton_router.HALVES
    for hidden in (1, 16, 32, 64, 128)
    for tokens in (FEW, MANY)
]


def launches_of(gpu, arch, dtype, hidden, tokens, experts=32):
    launches = gpu(arch)
    with FakeTensorMode(), torch.device("cuda"):
        weights = (
            torch.empty(hidden, 1024, dtype=dtype),
            torch.empty(experts, hidden, dtype=dtype),
        )
        scores = triton_router.scores(torch.empty(2, tokens // 2, 1024, dtype=dtype), *weights)
        mask, finite = triton_router.threshold(scores, 0.3)
    assert (scores.shape, scores.dtype) == ((2, tokens // 2, experts), dtype)
    assert (mask.shape, mask.dtype) == (scores.shape, torch.bool)
    assert (finite.shape, finite.dtype) == ((), torch.bool)
    return launches


@needs_triton
@quick_first(QUICK, LAUNCHES)
def test_machine_code_of_scores(gpu, launch):
    """Tensor cores, tiles that arrive meanwhile, no spilled registers, and two programs or more per
    multiprocessor."""
    from dmoe_var.moe import triton_router_kernels

    arch = launch[0]
    found = compiled(triton_router_kernels.scores, *launches_of(gpu, *launch)["scores"], arch)
    code = machine_code(found)
    no_slower_than_meant(found, code, arch)
    assert {80: "HMMA", 90: "HGMMA"}[arch] in code
    assert "LDGSTS" in code
    assert 2 * found.metadata.shared <= SHARED_MEMORY[arch]


@needs_triton
@pytest.mark.parametrize(
    ("arch", "experts"),
    [(90, 32), *(pytest.param(*x, marks=pytest.mark.slow) for x in [(80, 32), (80, 1), (90, 256)])],
)
def test_machine_code_of_threshold(gpu, arch, experts):
    from dmoe_var.moe import triton_router_kernels

    launches = launches_of(gpu, arch, torch.bfloat16, 128, FEW, experts)
    found = compiled(triton_router_kernels.threshold, *launches["threshold"], arch)
    no_slower_than_meant(found, machine_code(found), arch)
