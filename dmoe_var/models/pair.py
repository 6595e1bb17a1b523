"""A VQ-VAE and the VAR over its tokens: built together, or checked to belong together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE, VQVAEConfig

IN_PAIRS = ("patch_nums", "vocab_size", "z_channels")
"""Fields that both have in common."""


def build_models(
    depth: int = 16, vqvae: VQVAEConfig | None = None, **overrides: object
) -> tuple[VQVAE, VAR]:
    """Build fresh models, initialised as published; `overrides` are fields of VARConfig.

    The fields that VQ-VAE and VAR share (IN_PAIRS) come from `vqvae`; an override of one of them
    shapes both.
    """
    base = vqvae or VQVAEConfig()
    common: dict[str, Any] = {name: overrides.pop(name, getattr(base, name)) for name in IN_PAIRS}
    var_config = VARConfig(depth=depth, **common, **overrides)  # type: ignore[arg-type]
    return VQVAE(replace(base, **common)), VAR(var_config)


def check_pair(vqvae: VQVAE, var_config: VARConfig) -> None:
    """Raise ValueError if a VAR does not belong to a VQ-VAE."""
    for name in IN_PAIRS:
        theirs, ours = getattr(vqvae.config, name), getattr(var_config, name)
        if theirs != ours:
            raise ValueError(f"{name}: the VQ-VAE has {theirs}, the VAR has {ours}")
