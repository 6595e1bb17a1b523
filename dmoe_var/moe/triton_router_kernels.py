"""The kernels of triton_router.py, which says what they do; this file needs the triton package.

Triton reads a kernel's annotations when it compiles: they must be objects, so this file does not
import `annotations`, and other arguments have none.
Legend: N tokens, C width, R hidden neurons of the router, E experts.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def scores(
    x_ptr, w1_ptr, w2_ptr, scores_ptr, N, C, R, E,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write |GELU(x W1^T) W2^T| (N, E) for ROWS tokens; W1 is (R, C), W2 (E, R).

    All hidden values of a token stay in registers, HIDDEN of them, and are rounded once. DEPTH of
    its inputs are multiplied at a time, and EXPERTS scores are computed at a time.
    """
    token_N = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there_N = token_N < N
    neuron_R = tl.arange(0, HIDDEN)
    has_R = neuron_R < R

    sum_NR = tl.zeros((ROWS, HIDDEN), dtype=tl.float32)
    place_K = tl.arange(0, DEPTH)
    x_NK = x_ptr + token_N[:, None] * C + place_K[None, :]
    w1_KR = w1_ptr + neuron_R[None, :] * C + place_K[:, None]
    for start in range(0, C, DEPTH):
        inside_K = place_K < C - start
        tile_NK = tl.load(x_NK + start, mask=there_N[:, None] & inside_K[None, :], other=0.0)
        tile_KR = tl.load(w1_KR + start, mask=inside_K[:, None] & has_R[None, :], other=0.0)
        sum_NR = tl.dot(tile_NK, tile_KR, sum_NR)
    root_half: tl.constexpr = 0.7071067811865476
    gelu_NR = 0.5 * sum_NR * (1 + tl.erf(sum_NR * root_half))
    hidden_NR = gelu_NR.to(x_ptr.dtype.element_ty)

    for first in range(0, E, EXPERTS):
        expert_E = first + tl.arange(0, EXPERTS)
        has_E = expert_E < E
        w2_RE = w2_ptr + expert_E[None, :] * R + neuron_R[:, None]
        tile_RE = tl.load(w2_RE, mask=has_R[:, None] & has_E[None, :], other=0.0)
        score_NE = tl.abs(tl.dot(hidden_NR, tile_RE))
        out_NE = scores_ptr + token_N[:, None] * E + expert_E[None, :]
        inside_NE = there_N[:, None] & has_E[None, :]
        tl.store(out_NE, score_NE.to(scores_ptr.dtype.element_ty), mask=inside_NE)


@triton.jit(do_not_specialize=["N"])
def threshold(
    scores_ptr, mask_ptr, finite_ptr, N, E, tau, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):
    """Write the mask (N, E) of scores >= tau * the largest for ROWS tokens, and whether all their
    scores are finite. Like torch, it rounds the product to the scores' dtype."""
    token_N1 = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert_1E = tl.arange(0, EXPERTS)[None, :]
    inside_NE = (token_N1 < N) & (expert_1E < E)
    place_NE = token_N1 * E + expert_1E
    score_NE = tl.load(scores_ptr + place_NE, mask=inside_NE, other=0.0).to(tl.float32)
    most_N = tl.max(tl.where(inside_NE, score_NE, float("-inf")), axis=1)
    limit_N = (most_N * tau).to(scores_ptr.dtype.element_ty).to(tl.float32)
    runs_NE = score_NE >= limit_N[:, None]
    tl.store(mask_ptr + place_NE, runs_NE.to(tl.uint8), mask=inside_NE)
    wrong_NE = tl.where(tl.abs(score_NE) < float("inf"), 0, 1)  # which NaN is not, either
    finite = tl.max(tl.max(wrong_NE, axis=1), axis=0) == 0
    tl.store(finite_ptr + tl.program_id(0), finite.to(tl.uint8))
