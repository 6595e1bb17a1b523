"""What compute paths read of a mask."""

from __future__ import annotations

import pytest
import torch

from dmoe_var.moe.experts import Dispatch

N, E = 7, 5
ALL, NONE = torch.ones(N, E, dtype=torch.bool), torch.zeros(N, E, dtype=torch.bool)
HALF = torch.rand(N, E, generator=torch.Generator().manual_seed(0)) < 0.5
NO_TOKENS = ALL[:0]


@pytest.mark.parametrize("mask_NE", [HALF, ALL, NONE, NO_TOKENS])
def test_lists(mask_NE):
    """Token by token."""
    dispatch, chosen = Dispatch(mask_NE), mask_NE.tolist()
    rows = [[n for n, runs in enumerate(chosen) if runs[e]] for e in range(E)]
    assert [rows_n.tolist() for rows_n in dispatch.rows] == rows
    assert dispatch.tokens_P.tolist() == [n for of in rows for n in of]
    assert dispatch.counts == [len(of) for of in rows]
    if chosen:
        assert dispatch.density == pytest.approx(sum(dispatch.counts) / (N * E))


@pytest.mark.parametrize("mask_NE", [HALF, ALL, NONE])
def test_it_is_full_once_that_is_known(mask_NE):
    dispatch = Dispatch(mask_NE)
    assert not dispatch.is_full()
    assert dispatch.density == mask_NE.float().mean()
    assert dispatch.is_full() == (mask_NE is ALL)
