"""dmoe-var: Dynamic Mixture-of-Experts for Visual Autoregressive Models (arXiv 2510.08629)."""

from __future__ import annotations

# ruff: noqa: E402
from dmoe_var.threads import settle_threads

settle_threads()  # before torch is imported

from dmoe_var.checkpoints import load_var, load_vqvae
from dmoe_var.conversion.to_moe import convert_to_moe
from dmoe_var.metrics.flops import count_flops
from dmoe_var.models.collaborative_var import CollaborativeVAR
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.head_skipping import HeadSkipping
from dmoe_var.models.pair import build_models
from dmoe_var.models.recipe import Recipe
from dmoe_var.models.token_skipping import TokenSkipping
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE, VQVAEConfig
from dmoe_var.moe.selection import All, Cumulative, Oracle, Random, Threshold, TopK
from dmoe_var.sampling.cuda_graphs import CudaGraphs
from dmoe_var.sampling.sampler import generate

__all__ = [
    "VAR",
    "VQVAE",
    "All",
    "CollaborativeVAR",
    "CudaGraphs",
    "Cumulative",
    "DynamicVAR",
    "HeadSkipping",
    "Oracle",
    "Random",
    "Recipe",
    "Threshold",
    "TokenSkipping",
    "TopK",
    "VARConfig",
    "VQVAEConfig",
    "build_models",
    "convert_to_moe",
    "count_flops",
    "generate",
    "load_var",
    "load_vqvae",
]
