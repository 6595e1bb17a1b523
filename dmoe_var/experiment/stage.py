"""Define a stage: what it runs, which keys it reads, which stages it builds on.

Each stands in the file of its name in stages/, which is imported when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from dmoe_var.config.root import Config
from dmoe_var.distributed import launched_processes
from dmoe_var.errors import ConfigError

FOLDER = Path(__file__).resolve().parent.parent / "stages"
STAGES = tuple(sorted(file.stem for file in FOLDER.glob("[!_]*.py")))
"""Every file there is a stage; what stages share lies in folders."""

Keys = tuple[str, ...]


@dataclass(frozen=True)
class StageResult:
    """What a stage hands over for its record."""

    metrics: Mapping[str, float]
    num_samples: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    """The seed, if it is not the configuration's own (a sample has its own)."""
    dtype: str | None = None
    """The precision, if it is not that of training."""


@dataclass(frozen=True)
class Stage:
    """What the machinery asks of a stage. `run` gets an Experiment whose configuration raises on
    any key that neither the stage nor one that it builds on declares."""

    name: str
    run: Callable[[Any], StageResult]
    reads: Keys | Callable[[Config, Config], Keys]
    """Sections and keys, or a function of the configuration in question and of the run's own. The
    two differ if a variant's name is found by what the experiment itself would read."""
    needs: Keys | Callable[[Config], Keys] = ()
    """The stages that it builds on, by the run's configuration."""
    given: str | None = None
    """The key of a base model that stands in for this stage's. It is then only validated, and other
    stages do without this one."""
    refuse: Callable[[Config], None] | None = None
    """Raises ConfigError for what only this stage cannot do with the configuration."""
    look: Callable[[Any], object] | None = None
    """Looks at the models that it is given beside those of earlier stages, before any of them runs.
    """
    one_process: bool = False
    """Whether it cannot run under torchrun."""
    reads_pictures: bool = False
    """Whether its numbers depend on the pictures themselves. Those of other stages depend on the
    pictures that their models were made of."""
    compares: bool = False
    """Whether its numbers depend on reference images."""
    always_runs: bool | Callable[[Config], bool] = False
    """Whether it is never taken for done, as it measures this machine or tells of other records."""

    def reads_of(self, config: Config, ours: Config) -> Keys:
        return self.reads(config, ours) if callable(self.reads) else self.reads

    def needs_of(self, config: Config) -> Keys:
        return self.needs(config) if callable(self.needs) else self.needs

    def is_given(self, config: Config) -> bool:
        """Whether the stage only validates a base model that is given."""
        return self.given is not None and config.leaves[self.given] is not None

    def is_never_done(self, config: Config) -> bool:
        return self.always_runs(config) if callable(self.always_runs) else self.always_runs

    def check(self, config: Config) -> None:
        """Raise ConfigError for what only this stage cannot do with the configuration."""
        if self.one_process and launched_processes() > 1:
            raise ConfigError(
                f"{self.name} runs in one process, torchrun started {launched_processes()}"
            )
        if self.refuse is not None:
            self.refuse(config)


def find(name: str) -> Stage:
    """Look up the stage of a name. Raise ValueError if there is none."""
    if name not in STAGES:
        raise ValueError(f"stage={name!r} is none of {', '.join(STAGES)}")
    stage: Stage = import_module(f"dmoe_var.stages.{name}").STAGE
    return stage
