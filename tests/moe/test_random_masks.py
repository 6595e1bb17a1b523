"""Masks by chance: their density, and that nothing but it is given."""

from __future__ import annotations

import pytest
import torch

from dmoe_var.moe.selection import RandomDensity


@pytest.mark.parametrize("mean", [0.0, 0.3, 3.0, 4.7, 8.0])
@pytest.mark.parametrize("shape", [(2, 9, 8), (1, 1, 8), (4, 100, 8)])
def test_density(mean, shape):
    """Each token has the whole number of experts below or above; the mean is met to 1 / N."""
    mask = RandomDensity(mean)(torch.rand(shape))
    assert (mask.shape, mask.dtype) == (shape, torch.bool)
    per_token = mask.sum(-1).flatten()
    assert set(per_token.tolist()) <= {int(mean), -int(-mean // 1)}
    assert abs(per_token.double().mean().item() - mean) <= 0.5 / len(per_token) + 1e-9


def test_by_chance_and_not_by_scores():
    """All experts alike, whatever the scores; the same mask each time, so that drawing is free."""
    scores = torch.arange(8.0).expand(1, 4000, 8)
    mask = RandomDensity(2.5)(scores)
    assert torch.equal(mask, RandomDensity(2.5)(-scores))
    share = mask.double().mean((0, 1))
    assert torch.allclose(share, torch.full((8,), 2.5 / 8).double(), atol=0.03)
    assert RandomDensity(2.5).uses_scores  # so that the router runs


def test_a_mean_below_zero():
    with pytest.raises(ValueError, match="mean=-1"):
        RandomDensity(-1)
