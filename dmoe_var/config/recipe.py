"""Configure the search for a recipe, and read the file that it leaves.

A recipe is a list of configuration keys with their values: which techniques run, and how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dmoe_var.config_fields import STRICT, Distinct, Index, Listed, PositiveShare, Seed, Several
from dmoe_var.errors import ConfigError
from dmoe_var.files import read_json, write_text

FORMAT = "dmoe-var-recipe/1"


@dataclass(frozen=True)
class FindRecipeConfig:
    """Which techniques are tried, and how they are compared."""

    __pydantic_config__ = STRICT

    budget: PositiveShare = 0.5
    """FLOPs of an image as a share of the dense model's under the configured guidance, decoder
    left out. With drafter.var it is the drafter's, drawing every scale."""
    unguided: Annotated[tuple[Index, ...], Listed, Several, Distinct] = (0, 1, 2, 3, 4)
    """How many of the last scales have no guidance, each tried."""
    cfg: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Listed, Distinct] = ()
    """Strengths of guidance that are tried at the other scales, beside sampling.cfg."""
    drafted: Annotated[tuple[Index, ...], Listed, Distinct] = ()
    """How many of the first scales drafter.var draws, each tried with each end of guidance; none
    given is drafter.scales alone."""
    skipped_tokens: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], ...], Listed, Several, Distinct
    ] = (0.0, 0.4)
    """Shares of the tokens that are skipped at the last two scales, each tried."""
    means: bool = True
    """Whether means of what is skipped are tried."""
    num_samples: Annotated[int, Field(ge=2)] = 1000
    """Images by which recipes are compared."""
    seed: Seed = 2000
    """Seed of these images; those that verify the best one take the next."""


def write_recipe(path: Path, keys: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a recipe. about: what was measured of it."""
    text = json.dumps({"format": FORMAT, "keys": keys, "about": about}, indent=1, allow_nan=False)
    write_text(path, text + "\n")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the keys of a recipe with their values. Raise ConfigError for any other file."""
    try:
        content = read_json(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"recipe={error}") from error
    found = content if isinstance(content, dict) else {}
    keys = found.get("keys")
    if found.get("format") != FORMAT or not isinstance(keys, dict):
        raise ConfigError(f"recipe={path}: no recipe; find_recipe leaves one (format {FORMAT})")
    return keys
