"""What the Triton kernels compute, on a CPU by Triton's interpreter; test_triton.py runs this file.

bfloat16 is left out: the interpreter multiplies its bits as if they were whole numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from float64_experts import in_float64, layer, tokens
from torch import nn

from dmoe_var.errors import InputError
from dmoe_var.moe import triton_router
from dmoe_var.moe.experts import RAN, ExpertWeights, run_experts, triton
from dmoe_var.moe.router import Router
from dmoe_var.moe.selection import Oracle, Threshold

RELU = nn.ReLU()
PRECISION = {torch.float32: 1e-6, torch.float16: 1e-3}
"""Relative error of the norm."""
# N tokens, C width, E experts, D neurons of an expert
LAYERS = [(1, 1, 1, 1), (150, 33, 6, 3), (150, 130, 6, 40), (200, 16, 1, 256)]
GUARD = 4096
"""Elements on both sides of memory that the kernels are given."""
_tile = triton.tile


def mask(N, E):
    """An expert by chance, and others: of no token, the last, all, every seventh, one in E."""
    draws = torch.rand(N, generator=torch.Generator().manual_seed(3))
    token = torch.arange(N)
    kinds = (draws < 0.6, draws < 0, token == N - 1, draws < 2, token % 7 == 0, token % E == 0)
    return torch.stack([kinds[e % len(kinds)] for e in range(E)], 1)


def run(x, mask, weights):
    """By the kernels themselves: no other path in their place."""
    before = RAN["triton"]
    out = run_experts(x, mask, weights, RELU, "triton")
    assert RAN["triton"] == before + 1
    return out


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """New memory holds no zeros by luck, and nothing is written beside it."""
    given, empty = [], torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return empty(self, *shape, device=device)
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        dtype = dtype or self.dtype
        poison = float("nan") if dtype.is_floating_point else 99
        memory = torch.full((math.prod(shape) + 2 * GUARD,), poison, dtype=dtype)
        given.append((memory, memory.clone()))
        return memory[GUARD:-GUARD].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for memory, before in given:
        for side in (slice(GUARD), slice(-GUARD, None)):
            assert torch.equal(memory[side].nan_to_num(7), before[side].nan_to_num(7))


@pytest.fixture
def small(monkeypatch):
    """Blocks of two tiles: the interpreter takes as long for each program as a GPU for all."""
    monkeypatch.setattr(triton, "tile", lambda *given: _tile(*given)._replace(block=128))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_values(sizes, dtype):
    """Over ragged numbers of tokens, of tiles and blocks."""
    N, C, E, D = sizes
    given = tokens(N, C, dtype), mask(N, E), layer(C, E, D, dtype)
    out, expected = run(*given), in_float64(*given)
    assert out.dtype == dtype
    assert (out - expected).norm() <= PRECISION[dtype] * expected.norm()


def test_many_tokens():
    """By the larger tiles, as they are."""
    N, (C, E, D), dtype = triton.MANY_TOKENS + 9, (40, 1, 24), torch.float16
    given = tokens(N, C, dtype), mask(N, E), layer(C, E, D, dtype)
    expected = in_float64(*given)
    assert (run(*given) - expected).norm() <= PRECISION[dtype] * expected.norm()


def row_lists_by_torch(mask_NE, block):
    """By torch's sort."""
    N, E = mask_NE.shape
    padded = mask_NE.new_zeros(-(-N // block) * block, E)
    padded[:N] = mask_NE
    mask_BET = padded.view(-1, block, E).transpose(1, 2)
    rows = torch.sort(mask_BET.int(), dim=-1, descending=True, stable=True).indices
    return rows.to(torch.int16), mask_BET.sum(-1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("N", "E", "block"),
    [(1, 1, 512), (511, 3, 512), (513, 9, 512), (2048, 4, 1024), (1030, 7, 1024)],
)
def test_row_lists(N, E, block):
    given = mask(N, E), block
    for found, expected in zip(triton.row_lists(*given), row_lists_by_torch(*given), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("small")
def test_repeated_runs_agree_to_the_bit():
    given = tokens(140, 33), mask(140, 3), layer(33, 3, 3)
    assert torch.equal(run(*given), run(*given))


@pytest.mark.usefixtures("small")
def test_tokens_that_do_not_lie_beside_each_other():
    weights, wide, mask_NE = layer(12, 5, 3), tokens(20, 24), mask(5, 20).T
    expected = run(wide[:, ::2].contiguous(), mask_NE.contiguous(), weights)
    assert torch.equal(run(wide[:, ::2], mask_NE, weights), expected)


def test_no_tokens():
    assert run(tokens(0, 12), torch.ones(0, 5, dtype=torch.bool), layer(12, 5, 3)).shape == (0, 12)


@pytest.mark.usefixtures("small")
def test_what_is_not_finite_stays_so():
    """In its token's output, where an expert reads it."""
    x, weights = tokens(9, 12), layer(12, 5, 3)
    x[4:6, 0] = torch.nan
    mask_NE = torch.ones(9, 5, dtype=torch.bool)
    mask_NE[5] = False
    out = run(x, mask_NE, weights)
    assert out[4].isnan().all()
    assert out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.usefixtures("small")
def test_what_the_kernels_do_not_know_is_run_by_grouped():
    x, mask_NE, weights = tokens(9, 12), mask(9, 5), layer(12, 5, 3)
    double = ExpertWeights(*(w.double() for w in weights))
    learning = weights._replace(w1_EDC=weights.w1_EDC.clone().requires_grad_())
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *given: None)
    cases = [
        (x, weights, nn.GELU(approximate="tanh")),
        (x, weights, hooked),
        (x.double(), double, RELU),
        (x, learning, RELU),
        (x.clone().requires_grad_(), weights, RELU),
    ]
    for given in cases:
        before = RAN["grouped"]
        out = run_experts(given[0], mask_NE, *given[1:], "triton")
        assert RAN["grouped"] == before + 1
        assert torch.equal(out, run_experts(given[0], mask_NE, *given[1:], "grouped"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not triton.can_run(x, weights, RELU)
    with torch.no_grad():
        assert torch.equal(run(x, mask_NE, learning), run(x, mask_NE, weights))


# N tokens, C width, R hidden neurons of the router, E experts
ROUTERS = [(1, 1, 1, 1), (150, 130, 9, 33), (64, 64, 16, 32), (70, 40, 128, 70)]


def router(C, R, E):
    torch.manual_seed(4)
    return Router(C, R, E).half().requires_grad_(False)


@pytest.fixture
def by_kernels(monkeypatch):
    """The names of the router's kernels in the order in which they ran."""
    ran = []
    for name in ("scores", "threshold"):
        run = getattr(triton_router, name)
        monkeypatch.setattr(
            triton_router,
            name,
            lambda *given, name=name, run=run: (ran.append(name), run(*given))[1],
        )
    return ran


@pytest.mark.parametrize("sizes", ROUTERS, ids=str)
def test_scores(by_kernels, sizes):
    """Against |fc2 GELU(fc1 x)| in float64, for two rows of tokens."""
    N, C, R, E = sizes
    x, given = tokens(2 * N, C, torch.float16).view(2, N, C), router(C, R, E)
    found = given(x)
    hidden = x.double() @ given.fc1.weight.double().T
    gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    expected = (gelu @ given.fc2.weight.double().T).abs()
    assert by_kernels == ["scores"]
    assert found.dtype == torch.float16
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_scores_of_many_tokens(monkeypatch):
    """By the larger tile, to the bits of the smaller one."""
    x, given = tokens(300, 40, torch.float16), router(40, 5, 3)
    few = given(x)
    monkeypatch.setattr(triton_router, "MANY_TOKENS", 300)
    assert torch.equal(given(x), few)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(("N", "E"), [(1, 1), (5, 3), (300, 33), (20, 1000)])
def test_threshold(by_kernels, N, E, dtype):
    """Equals Eq. 3 by torch, in the scores' dtype: many are at the limit once it is rounded."""
    scores = 1 + 5 * tokens(N, E).abs()
    if dtype != torch.float32:
        scores = scores.round().to(dtype)
    for tau, given in ((0.30005, scores.view(1, N, E)), (1.0, -scores)):
        assert torch.equal(Oracle(tau)(given), given >= tau * given.amax(-1, keepdim=True))
    assert Threshold(0.0)(scores).all()
    assert by_kernels == ([] if dtype == torch.float32 else ["threshold"] * 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (299, 6)])
def test_scores_that_are_not_finite(by_kernels, value, place):
    scores = tokens(300, 7, torch.float16).abs()
    scores[place] = value
    with pytest.raises(InputError, match="score is not finite"):
        Threshold(0.3)(scores)
    assert by_kernels == ["threshold"]


def test_what_the_routers_kernels_do_not_know_is_left_to_torch(by_kernels):
    x = tokens(9, 12, torch.float16)
    learns, wide, hooked = router(12, 5, 3).requires_grad_(), router(12, 129, 3), router(12, 5, 3)
    hooked.fc2.register_forward_hook(lambda *given: None)
    bits = router(12, 5, 3).bfloat16()
    expected = bits.fc2(torch.nn.functional.gelu(bits.fc1(x.bfloat16()))).abs()
    with pytest.MonkeyPatch.context() as patch:  # no native kernel either
        patch.setenv("DMOE_VAR_NATIVE", "0")
        assert torch.equal(bits(x.bfloat16()), expected)
        assert Threshold(0.3)(expected).shape == (9, 3)
    for each in (learns, wide, hooked):
        expected = each.fc2(torch.nn.functional.gelu(each.fc1(x))).abs()
        assert torch.equal(each(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert router(12, 5, 3)(x).dtype == torch.bfloat16
    assert router(12, 5, 3)(x[:0]).shape == (0, 3)
    assert Threshold(0.3)(x[:0]).shape == (0, 12)
    assert by_kernels == []
    with torch.no_grad():
        learns(x)
    assert by_kernels == ["scores"]


def test_inputs_of_the_router_that_do_not_lie_beside_each_other(by_kernels):
    wide, given = tokens(20, 24, torch.float16), router(12, 5, 3)
    scores = given(wide[:, ::2])
    assert torch.equal(scores, given(wide[:, ::2].contiguous()))
    assert torch.equal(Threshold(0.3)(scores.T.contiguous().T), Threshold(0.3)(scores))
    assert by_kernels == ["scores"] * 2 + ["threshold"] * 2
