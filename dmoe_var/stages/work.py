"""Where a stage works: its folder, what its result depends on, and whether it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dmoe_var.config import Config
from dmoe_var.errors import ConfigError, InputError
from dmoe_var.training.loop import Run

DEFAULT_VARIANT = "default"
MAX_NAME = 60

READS: dict[str, tuple[str, ...]] = {
    "train_vqvae": ("seed", "dtype", "data", "vqvae", "base.vqvae", "train_vqvae"),
    "train_var": ("var", "base.var", "train_var"),
    "sparsify": ("sparsify",),
    "split": ("split",),
    "train_router": ("train_router",),
    "sample": ("moe", "selection", "sampling", "sample", "evaluate.seed"),
    "evaluate": ("moe", "selection", "sampling", "evaluate", "fidelity"),
    "sweep": ("moe", "sampling", "evaluate.num_samples", "fidelity", "sweep"),
}
"""The configuration keys that each stage reads itself."""

NEEDS: dict[str, tuple[str, ...]] = {
    "train_vqvae": (),
    "train_var": ("train_vqvae",),
    "sparsify": ("train_var",),
    "split": ("sparsify",),
    "train_router": ("split",),
    "sample": ("train_router",),
    "evaluate": ("train_router",),
    "sweep": ("train_router",),
}
"""The stages that each builds on."""

HOUSEKEEPING = ("log_every", "validate_every", "checkpoint_every")
"""Keys of training sections that do not change a result."""


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def chosen_device(name: str) -> torch.device:
    """The device of a configuration; "auto" takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device={name}: this machine has no CUDA device; allowed: auto, cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("device=mps: this machine has no MPS device; allowed: auto, cpu")
    return torch.device(name)


@dataclass(frozen=True)
class Work:
    """A configuration, and the experiment's own (`baseline`) that names what differs from it."""

    config: Config
    baseline: Config

    @property
    def root(self) -> Path:
        """runs/<experiment>."""
        return Path(self.config.run_dir) / self.config.name

    @property
    def cache(self) -> Path:
        """Token caches and reference statistics, shared by all experiments."""
        return Path(self.config.run_dir) / "cache"

    @property
    def device(self) -> torch.device:
        return chosen_device(self.config.device)

    def needs(self, stage: str) -> tuple[str, ...]:
        """The stages that a stage builds on; a dense point needs no experts."""
        dense_point = stage == "evaluate" and self.config.evaluate.model == "dense"
        return ("train_var",) if dense_point else NEEDS[stage]

    def check(self, stage: str) -> None:
        """ConfigError for what only this stage cannot do with the configuration."""
        if stage != "sweep":
            return
        allowed = sorted({1, len(self.config.moe.scales)})
        for name, taus in self.config.sweep.lists.items():
            if len(taus) not in allowed:
                raise ConfigError(
                    f"sweep.lists.{name}={list(taus)} must have {' or '.join(map(str, allowed))} "
                    "values, one for all or one for each of moe.scales"
                )

    def _reads(self, stage: str, config: Config) -> tuple[str, ...]:
        if stage == "evaluate" and config.evaluate.model == "dense":
            return tuple(key for key in READS[stage] if key not in ("moe", "selection"))
        return READS[stage]

    def relevant(self, stage: str, config: Config | None = None) -> dict[str, Any]:
        """Every key that a stage's result depends on, its own and those of what it builds on."""
        config = config or self.config
        keys: dict[str, Any] = {}
        for upstream in self.needs(stage):
            keys |= self.relevant(upstream, config)
        leaves = dict(flatten(asdict(config)))
        for section in self._reads(stage, config):
            for key, value in leaves.items():
                inside = key == section or key.startswith(f"{section}.")
                if inside and key.rpartition(".")[2] not in HOUSEKEEPING:
                    keys[key] = value
        return keys

    def fingerprint(self, stage: str) -> str:
        """Hash of all that a stage's result depends on."""
        return _hash(self.relevant(stage))

    def variant(self, stage: str) -> str:
        """`default`, or a short name with a hash of what differs from the experiment's own."""
        baseline = self.relevant(stage, self.baseline)
        ours = self.relevant(stage)
        keys = sorted(baseline.keys() | ours.keys())
        missing = object()
        differs = [k for k in keys if baseline.get(k, missing) != ours.get(k, missing)]
        if not differs:
            return DEFAULT_VARIANT
        parts = []
        for key in differs:
            if key not in ours:  # a dense point does not depend on experts
                continue
            value = ours[key]
            text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(f"{key.rpartition('.')[2]}={text}")
        name = "".join(c if c.isalnum() or c in "=._-+" else "-" for c in "_".join(parts))
        return f"{name[:MAX_NAME]}-{_hash({k: ours.get(k) for k in differs})[:8]}"

    def folder(self, stage: str) -> Path:
        """runs/<experiment>/<stage>/<variant>."""
        return self.root / stage / self.variant(stage)

    def training_run(self, stage: str) -> Run:
        """How the training loop is to run this stage."""
        config = self.config
        return Run(
            folder=self.folder(stage),
            fingerprint=self.fingerprint(stage),
            name=stage,
            seed=config.seed,
            amp_dtype=getattr(torch, config.dtype),
            wandb=config.wandb,
            config=self.relevant(stage),
            progress=config.progress,
        )


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
