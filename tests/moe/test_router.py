"""The router's formula, size and initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.moe.router import Router, default_hidden


def test_formula():
    torch.manual_seed(0)
    router = Router(16, 6, 5).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    z = x @ router.fc1.weight.T
    gelu = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    expected = gelu @ router.fc2.weight.T
    assert (expected < 0).any()
    assert_close(router(x), expected.abs(), rtol=0, atol=1e-12)


def test_default_hidden():
    widths = (4, 64, 512, 1024, 1920)
    assert [default_hidden(width) for width in widths] == [1, 8, 64, 128, 128]


def test_published_router_costs_what_the_paper_says():
    """d16, last three scales, both guidance branches: 2.3 GMAC (PAPER.md, section 5)."""
    router = Router(1024, default_hidden(1024), 32)
    per_token = sum(p.numel() for p in router.parameters())
    tokens = 2 * (10**2 + 13**2 + 16**2)
    assert 16 * tokens * per_token / 1e9 == pytest.approx(2.3, abs=0.05)


def test_split_models_keep_the_routers_initialisation(make_var, make_moe):
    """Uniform within 1 / sqrt(fan in), as torch initialises Linear; not the VAR's trunc-normal."""
    router = make_moe(make_var(), expert_size=16).blocks[1].ffn.router
    for weight in (router.fc1.weight, router.fc2.weight):
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
