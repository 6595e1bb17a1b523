"""Loading and saving: our checkpoints, and the published ones through one adapter."""

from __future__ import annotations

from dmoe_var.checkpoints.load import load_var, load_vqvae

__all__ = ["load_var", "load_vqvae"]
