"""A VQ-VAE and the VAR over its tokens: what they have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmoe_var import VQVAEConfig, build_models
from dmoe_var.models.pair import check_pair


def test_build_models_gives_a_pair():
    base = VQVAEConfig(ch=32, ch_mult=(1, 1), patch_nums=(1, 2), vocab_size=16, z_channels=4)
    vqvae, var = build_models(2, base, width=32, num_heads=2, patch_nums=[1, 2, 3], z_channels=8)
    assert vqvae.config == replace(base, patch_nums=(1, 2, 3), z_channels=8)
    assert (var.config.patch_nums, var.config.vocab_size) == ((1, 2, 3), 16)
    check_pair(vqvae, var.config)


@pytest.mark.parametrize(
    "other", [{"patch_nums": (1, 2, 3)}, {"vocab_size": 64}, {"z_channels": 4}]
)
def test_strangers_are_no_pair(make_vqvae, make_var, other):
    (name,) = other
    with pytest.raises(ValueError, match=name):
        check_pair(make_vqvae(), replace(make_var().config, **other))
