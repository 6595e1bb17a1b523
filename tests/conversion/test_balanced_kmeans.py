"""Balanced k-means: exact sizes, planted clusters found, lengths ignored, seeded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dmoe_var.conversion.balanced_kmeans import balanced_labels


def random_rows(num_neurons=96, width=8):
    return torch.randn(num_neurons, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("expert_size", [1, 6, 16, 48, 96])
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


def test_clusters_are_tighter_than_chance():
    rows = F.normalize(random_rows(), dim=1)

    def spread(labels):
        return sum((rows[labels == e] - rows[labels == e].mean(0)).square().sum() for e in range(6))

    found = balanced_labels(random_rows(), 16, seed=0)
    by_chance = [spread(found[torch.randperm(96)]) for _ in range(20)]
    assert spread(found) < 0.8 * min(by_chance)


def test_lengths_of_the_rows_do_not_matter():
    scales = 2.0 ** torch.arange(96).remainder(7)[:, None]
    rows = random_rows()
    assert torch.equal(balanced_labels(rows, 16, 0), balanced_labels(rows * scales, 16, 0))


def test_the_seed_decides():
    first, again, other = (balanced_labels(random_rows(), 16, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_dtype_with_or_without_gradient(dtype):
    rows = random_rows().to(dtype).requires_grad_()
    assert balanced_labels(rows, 16, 0).bincount().tolist() == [16] * 6


def test_a_size_that_does_not_divide_raises():
    with pytest.raises(ValueError, match="expert_size=10 does not divide the FFN's 96"):
        balanced_labels(random_rows(), 10, 0)
