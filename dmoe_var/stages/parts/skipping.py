"""Refuse to skip tokens or heads in stages, or for models, that cannot do with it."""

from __future__ import annotations

from collections.abc import Sequence

from dmoe_var.config.root import Config
from dmoe_var.errors import ConfigError


def refuse(config: Config, reason: str) -> None:
    """Raise ConfigError if tokens or heads are skipped. reason: why they may not be here."""
    refuse_tokens(config, reason)
    _refuse("heads", config.sampling.heads.ratios, reason)


def refuse_tokens(config: Config, reason: str) -> None:
    """Raise ConfigError if tokens are skipped."""
    _refuse("skipping", config.sampling.skipping.ratios, reason)


def _refuse(section: str, ratios: Sequence[float], reason: str) -> None:
    if any(ratios):
        raise ConfigError(f"sampling.{section}.ratios={list(ratios)}: {reason}; allowed here: []")


def refuse_router(config: Config, key: str) -> None:
    """Raise ConfigError if FFNs keep tokens by router. key: what says that a dense model samples,
    which has none."""
    skipping = config.sampling.skipping
    if skipping.scales and skipping.measure == "router":
        raise ConfigError(
            f"sampling.skipping.measure=router: {key} samples from a model without routers; "
            "allowed here: distance"
        )
