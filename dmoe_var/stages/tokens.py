"""Tokens of the experiment's images, from the cache."""

from __future__ import annotations

from dmoe_var.data import load_data
from dmoe_var.data.token_cache import TokenSet, tokenize
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.stages.work import Work


def token_sets(work: Work, vqvae: VQVAE) -> tuple[TokenSet, TokenSet]:
    """Training and held-out tokens."""
    training, held_out = load_data(work.config.data)
    cache, progress = work.cache / "tokens", work.config.progress
    return (
        tokenize(training, vqvae, cache, progress=progress),
        tokenize(held_out, vqvae, cache, progress=progress),
    )
