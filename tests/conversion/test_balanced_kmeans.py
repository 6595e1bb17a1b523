"""Balanced k-means: exact sizes, planted clusters found, lengths ignored, seeded."""

from __future__ import annotations

import pytest
import torch

from dmoe_var.conversion.balanced_kmeans import balanced_labels


def random_rows(num_neurons=96, width=8):
    return torch.randn(num_neurons, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("expert_size", [1, 16, 96])
def test_every_expert_has_its_size_exactly(expert_size):
    labels = balanced_labels(random_rows(), expert_size, seed=0)
    assert labels.dtype == torch.long
    assert labels.bincount().tolist() == [expert_size] * (96 // expert_size)


def test_planted_clusters_are_found():
    """Neurons along one axis each, of lengths that would mislead k-means of the raw rows."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.randperm(64, generator=generator) // 16
    rows = torch.eye(4)[planted] + 0.02 * torch.randn(64, 4, generator=generator)
    rows *= 10 ** torch.empty(64, 1).uniform_(-2, 2, generator=generator)
    labels = balanced_labels(rows, 16, seed=0)
    assert len(set(zip(planted.tolist(), labels.tolist(), strict=True))) == 4


def test_the_seed_decides():
    first, again, other = (balanced_labels(random_rows(), 16, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_of_any_dtype_that_train():
    rows = random_rows().to(torch.bfloat16).requires_grad_()
    assert balanced_labels(rows, 16, 0).bincount().tolist() == [16] * 6


def test_a_size_that_does_not_divide_raises():
    with pytest.raises(ValueError, match="expert_size=10 does not divide the FFN's 96"):
        balanced_labels(random_rows(), 10, 0)
