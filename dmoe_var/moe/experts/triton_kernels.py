"""The kernels of triton.py, which says what they are for; this file needs the triton package.

Triton reads a kernel's annotations when it compiles: they must be objects, so this file does not
import `annotations`, and other arguments have none.
Legend: N tokens, C width, E experts, D neurons per expert, T tokens per block.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def row_lists(mask_ptr, rows_ptr, counts_ptr, N, E, T: tl.constexpr, EXPERTS: tl.constexpr):
    """Write rows (blocks, E, T) and counts (blocks, E) of a mask (N, E), EXPERTS experts at a time.

    An expert's rows are the places in the block of the tokens that chose it, rising, then of all
    others.
    """
    block = tl.program_id(0)
    place_T1 = tl.arange(0, T)[:, None]
    expert_1E = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)[None, :]
    token_T1 = (block * T + place_T1).to(tl.int64)
    inside = (token_T1 < N) & (expert_1E < E)
    runs_TE = (tl.load(mask_ptr + token_T1 * E + expert_1E, mask=inside, other=0) != 0).to(tl.int32)
    before_TE = tl.cumsum(runs_TE, axis=0) - runs_TE
    count_1E = tl.sum(runs_TE, axis=0)[None, :]
    rank_TE = tl.where(runs_TE != 0, before_TE, count_1E + place_T1 - before_TE)
    list_1E = (block * E + expert_1E).to(tl.int64)
    tl.store(rows_ptr + list_1E * T + rank_TE, place_T1.to(tl.int16), mask=expert_1E < E)
    tl.store(counts_ptr + list_1E, count_1E, mask=expert_1E < E)


@triton.jit(do_not_specialize=["N"])
def fc1(
    x_ptr, w1_ptr, b1_ptr, rows_ptr, counts_ptr, hidden_ptr, N, C, E,
    D: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ReLU(x W1_e + b1_e) for ROWS rows of a list into hidden (N, E, D), and zeros for those
    that did not choose the expert. If none of them did, `zeros` writes them, so that each element
    is written once.

    Neighbouring programs run experts on the same tokens, which are in the cache by then.
    """
    columns: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // columns
    first, block = tl.program_id(1) * ROWS, tl.program_id(2)
    count = tl.load(counts_ptr + block * E + expert)
    if first >= count:
        return
    rank_R = first + tl.arange(0, ROWS)
    row_R = tl.load(rows_ptr + (block * E + expert).to(tl.int64) * T + rank_R)
    token_R = block.to(tl.int64) * T + row_R
    neuron_D = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)
    runs_R, there_D = rank_R < count, neuron_D < D

    sum_RD = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    place_K = tl.arange(0, DEPTH)
    x_RK = x_ptr + token_R[:, None] * C + place_K[None, :]
    w1_KD = w1_ptr + (expert * D + neuron_D).to(tl.int64)[None, :] * C + place_K[:, None]
    for start in range(0, C, DEPTH):
        inside_K = place_K < C - start
        tile_RK = tl.load(x_RK + start, mask=runs_R[:, None] & inside_K[None, :], other=0.0)
        tile_KD = tl.load(w1_KD + start, mask=inside_K[:, None] & there_D[None, :], other=0.0)
        sum_RD = tl.dot(tile_RK, tile_KD, sum_RD, input_precision=PRECISION)

    bias_D = tl.load(b1_ptr + expert * D + neuron_D, mask=there_D, other=0.0)
    sum_RD += bias_D.to(tl.float32)[None, :]
    # Not tl.maximum: of NaN and 0 it takes the 0.
    hidden_RD = tl.where((sum_RD < 0) | (rank_R >= count)[:, None], 0.0, sum_RD)
    out_RD = hidden_ptr + token_R[:, None] * (E * D) + (expert * D + neuron_D)[None, :]
    inside_RD = (token_R < N)[:, None] & there_D[None, :]
    tl.store(out_RD, hidden_RD.to(hidden_ptr.dtype.element_ty), mask=inside_RD)


@triton.jit(do_not_specialize=["N"])
def zeros(
    rows_ptr, counts_ptr, hidden_ptr, N, E,
    D: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write zeros into hidden (N, E, D) for ROWS rows of a list if none chose the expert.

    It needs little shared memory, so that many programs write at a time. Of fc1's two would.
    """
    columns: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // columns
    first, block = tl.program_id(1) * ROWS, tl.program_id(2)
    if first < tl.load(counts_ptr + block * E + expert):
        return
    rank_R = first + tl.arange(0, ROWS)
    row_R = tl.load(rows_ptr + (block * E + expert).to(tl.int64) * T + rank_R)
    token_R = block.to(tl.int64) * T + row_R
    neuron_D = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)
    out_RD = hidden_ptr + token_R[:, None] * (E * D) + (expert * D + neuron_D)[None, :]
    inside_RD = (token_R < N)[:, None] & (neuron_D < D)[None, :]
    nothing_RD = tl.zeros((ROWS, COLUMNS), dtype=hidden_ptr.dtype.element_ty)
    tl.store(out_RD, nothing_RD, mask=inside_RD)
