"""What scripts compose from configs/, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dmoe_var.config.explain import declared

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

ConfigStore.instance().store("declared", declared())


def composed(script: str, *overrides: str, folder: Path = CONFIGS, whole: bool = True) -> Any:
    """The plain content of a configuration. whole: every key that must be given is."""
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        content = hydra.compose(script, list(overrides))
    return OmegaConf.to_container(content, resolve=True, throw_on_missing=whole)
