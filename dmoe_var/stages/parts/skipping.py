"""Refuse to skip tokens or heads in stages, or for models, that cannot do with it."""

from __future__ import annotations

from dmoe_var.config.root import Config
from dmoe_var.errors import ConfigError


def refuse(config: Config, reason: str) -> None:
    """Raise ConfigError if tokens or heads are skipped. reason: why they may not be here."""
    sampling = config.sampling
    for key, ratios in (("skipping", sampling.skipping.ratios), ("heads", sampling.heads.ratios)):
        if any(ratios):
            raise ConfigError(f"sampling.{key}.ratios={list(ratios)}: {reason}; allowed here: []")


def refuse_router(config: Config, key: str) -> None:
    """Raise ConfigError if FFNs keep tokens by router. key: what says that a dense model samples,
    which has none."""
    skipping = config.sampling.skipping
    if skipping.scales and skipping.measure == "router":
        raise ConfigError(
            f"sampling.skipping.measure=router: {key} samples from a model without routers; "
            "allowed here: distance"
        )
