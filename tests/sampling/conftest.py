"""Tiny models to draw from."""

from __future__ import annotations

import pytest

from dmoe_var import DynamicVAR


@pytest.fixture(scope="session")
def tiny_models(make_var, make_moe, make_vqvae):
    """A dynamic VAR with experts at scales 2 and 3, and its VQ-VAE."""
    moe = make_moe(make_var(seed=1, activation="relu"))
    return DynamicVAR(make_var(seed=0), moe, (2, 3)), make_vqvae()
