"""Load and save our checkpoints; load the published ones through one adapter."""

from __future__ import annotations

from dmoe_var.checkpoints.load import load_var, load_vqvae

__all__ = ["load_var", "load_vqvae"]
