"""A VQ-VAE and a model with experts at its last two scales, for techniques of the sampler."""

from __future__ import annotations

import pytest

from dmoe_var import DynamicVAR
from dmoe_var.conversion.relufication import relufy


@pytest.fixture(scope="session")
def vqvae(make_vqvae):
    return make_vqvae()


@pytest.fixture(scope="module")
def dynamic(make_var, make_moe):
    return DynamicVAR(make_var(seed=0), make_moe(relufy(make_var(seed=1))), (2, 3))
