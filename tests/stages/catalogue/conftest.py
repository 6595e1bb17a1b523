"""An experiment with few values along each curve."""

from __future__ import annotations

import pytest

KEYS = {
    "figures.tau": [0.0, 0.5],
    "figures.alphas": [0.0, 1e-3],
    "figures.router_alphas": [1e-1, 1e-3],
    "figures.gelu_alpha": 3e-4,
    "figures.expert_sizes": [64, 32, 100, 128],
    "figures.single_scales": [3, 1],
    "figures.depths": {"2": None, "3": "three"},
    "figures.pruned_shares": [0.25, 0.5],
    "figures.k_shares": [0.25, 0.75],
    "figures.cumulative_shares": [0.9],
    "figures.time_tau": [0.0, 0.9],
    "figures.batch_size": 2,
    "figures.skipped": [0.25, 0.5],
    "figures.heads": [0.25, 0.5, 0.75],
    "var.num_heads": 2,
}


@pytest.fixture
def experiment(make_experiment):
    """Four experts of 32 on scales 2 and 3 of four; its operating point is tau 0.3, 0.6."""
    return make_experiment(edited=KEYS)
