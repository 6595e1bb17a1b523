"""Tell where a stage works: its folder, what its result depends on, and what makes it done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dmoe_var.checkpoints.load import file_dtype
from dmoe_var.config.root import Config
from dmoe_var.devices import chosen_device
from dmoe_var.distributed import from_main, is_main
from dmoe_var.experiment.contents import (
    GIVEN,
    MODELS,
    content,
    contents_of_files,
    given,
    hash_of,
    kind_of,
    same_content,
    told,
)
from dmoe_var.experiment.record import RESULT_FILE, Record, whole_record
from dmoe_var.experiment.stage import Keys, find
from dmoe_var.experiment.view import HOUSEKEEPING, optional, says, view, within
from dmoe_var.training.step import Run
from dmoe_var.training.tracking import Tracking

ABSENT = "not at hand"

DEFAULT_VARIANT = "default"
MAX_NAME = 60  # characters of a variant's name before its hash
SHOWN = 16
"""Characters of a given file's hash, or of its name, in the name of a variant."""


@dataclass(frozen=True)
class Experiment:
    """A configuration, and the experiment's own (`baseline`) that names what differs from it."""

    whole: Config
    baseline: Config
    reader: str | None = field(default=None, compare=False)
    """The stage that `config` is shown to; None shows all."""

    @cached_property
    def config(self) -> Config:
        """The configuration, as `reader` may read it."""
        if self.reader is None:
            return self.whole
        return view(self.whole, self.reader, self.declared(self.reader))

    def read_by(self, stage: str) -> Experiment:
        """Restrict the work to what a stage declared, for the stage to run."""
        return replace(self, reader=stage)

    @property
    def root(self) -> Path:
        """runs/<experiment>."""
        return Path(self.whole.run_dir) / self.whole.name

    @property
    def cache(self) -> Path:
        """Token caches and reference statistics, shared by all experiments."""
        return Path(self.whole.run_dir) / "cache"

    @property
    def device(self) -> torch.device:
        return chosen_device(self.whole.device)

    @property
    def progress(self) -> bool:
        """Whether this process shows how far it is."""
        return self.whole.progress and is_main()

    def needs(self, stage: str) -> Keys:
        """List the stages that a stage builds on; a point needs only what its model is made of."""
        return find(stage).needs_of(self.whole)

    def is_given(self, stage: str) -> bool:
        """Tell whether a stage only validates a base model that is given: others do without it."""
        return find(stage).is_given(self.whole)

    def check(self, stage: str) -> None:
        """Raise ConfigError for what only this stage cannot do with the configuration."""
        find(stage).check(self.whole)

    def declared(self, stage: str, config: Config | None = None) -> Keys:
        """List the keys and sections that a stage may read: its own, and those of what it builds
        on, whose models it loads."""
        found: dict[str, Keys] = {}

        def collect(name: str) -> None:
            if name not in found:
                found[name] = find(name).reads_of(config or self.whole, self.whole)
                for upstream in self.needs(name):
                    collect(upstream)

        collect(stage)
        return tuple(dict.fromkeys(key for keys in found.values() for key in keys))

    def relevant(self, stage: str, config: Config | None = None) -> dict[str, Any]:
        """Collect every key that a stage's result depends on, with those of what it builds on."""
        reads, leaves = self.declared(stage, config), (config or self.whole).leaves
        return {
            key: value
            for key, value in leaves.items()
            if within(key, reads) and not within(key, HOUSEKEEPING) and says(key, leaves)
        }

    def fingerprint(self, stage: str, recorded: Mapping[str, str] | None = None) -> str:
        """Hash all that a stage's result depends on, with the content of given weights, pictures
        and references. Pictures and references that are not at hand count as `recorded`."""
        content = {"weights": self.weights(stage), "contents": self.contents(stage, recorded)}
        return hash_of({**self._settings(stage), **content})

    def fingerprint_of_model(self, stage: str) -> str:
        """Hash all that tells a stage's model from others at one time. It looks at no pictures."""
        return hash_of({**self._settings(stage), "weights": self.weights(stage)})

    def fingerprint_of_images(self, stage: str, measuring: Keys) -> str:
        """Hash all that the images which a stage samples depend on. The keys `measuring`, which say
        how images are measured or stored, do not count."""
        keys = {**self._settings(stage), **self.weights(stage)}
        made_of = self._pictures_of_models(stage, besides=measuring)
        kept = {key: value for key, value in keys.items() if not within(key, measuring)}
        return hash_of({**kept, **({"pictures": made_of} if made_of else {})})

    def contents(self, stage: str, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """Hash what a stage is given beside weights, by configuration key: the pictures of `data`,
        a reference, samples of others.

        What is not at hand counts as `recorded`, as records are also read without the pictures.
        """
        places = given(find(stage), self.whole)
        found = {key: content(place, self.cache) for key, place in places.items()}
        recorded = recorded or {}
        hashes = {key: value or recorded.get(key, ABSENT) for key, value in found.items()}
        made_of = None if "data" in hashes else self._pictures_of_models(stage)
        return {**hashes, **({"data": made_of} if made_of else {})}

    def _pictures_of_models(self, stage: str, besides: Keys = ()) -> str | None:
        """Find the hash of the pictures that a stage's upstream models, `besides` some, were
        trained on, by their records; None if there is none."""
        for upstream in self.needs(stage):
            if upstream in besides:
                continue
            path, is_given = self.folder(upstream) / RESULT_FILE, self.is_given(upstream)
            record = None if is_given else whole_record(path, f"{upstream} is not done")
            if record is not None and "data" in record.weights:
                return record.weights["data"]
            if (earlier := self._pictures_of_models(upstream)) is not None:
                return earlier
        return None

    def _settings(self, stage: str) -> dict[str, Any]:
        """Collect what a stage depends on, without the places of given files."""
        return {k: v for k, v in self.relevant(stage).items() if k not in GIVEN}

    def weights(self, stage: str) -> dict[str, str]:
        """Hash the given files that a stage depends on with SHA-256, by configuration key. Raise
        CheckpointError if one cannot be found or fetched."""
        keys = self.relevant(stage)
        found: dict[str, str] = {}
        for key in GIVEN:
            if keys.get(key) is not None:
                found |= contents_of_files(key, keys[key])
        return found

    def weights_dtype(self, stage: str) -> dict[str, str]:
        """Read the precision that given models have in their files, by configuration key."""
        keys = self.relevant(stage)
        return {
            key: file_dtype(keys[key], kind_of(key)) for key in MODELS if keys.get(key) is not None
        }

    def differing(self, stage: str, record: Record) -> list[str]:
        """List how a record differs from what a stage would make now, one line per key. Given files
        differ by their content."""
        ours, theirs, kept = self.relevant(stage), record.config, record.weights
        weights, contents = self.weights(stage), self.contents(stage, kept)
        changed = {key for key in ours if key not in GIVEN and ours[key] != theirs.get(key)}
        changed |= {key for key in GIVEN if key in ours and weights.get(key) != kept.get(key)}
        declared = self.declared(stage)
        silent = {key for key in theirs if key not in ours and within(key, declared)}
        changed |= {key for key in silent if optional(key) and says(key, theirs)}
        others = [key for key, value in contents.items() if value != kept.get(key)]
        return [f"{key} has other content than there" for key in others] + [
            f"{key} is {ours.get(key, 'none')}, there {theirs.get(key)}" for key in sorted(changed)
        ]

    def variant(self, stage: str) -> str:
        """Name the variant: `default`, or a short name with a hash of what differs from the
        experiment's own.

        Two places of the same file do not differ, if its content is known without fetching it.
        """
        baseline = self.relevant(stage, self.baseline)
        ours = self.relevant(stage)
        missing = object()
        differs = [
            key
            for key in sorted(baseline.keys() | ours.keys())
            if baseline.get(key, missing) != ours.get(key, missing)
            and not same_content(key, baseline.get(key), ours.get(key))
        ]
        if not differs:
            return DEFAULT_VARIANT
        shown = {key: told(key, ours[key]) for key in differs if key in ours}
        parts = []
        for key, value in shown.items():  # a dense point does not depend on experts
            text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(f"{key.rpartition('.')[2]}={text[:SHOWN] if key in GIVEN else text}")
        name = "".join(c if c.isalnum() or c in "=._-+" else "-" for c in "_".join(parts))
        return f"{name[:MAX_NAME]}-{hash_of({key: shown.get(key) for key in differs})[:8]}"

    def folder(self, stage: str) -> Path:
        """Name the stage's folder: runs/<experiment>/<stage>/<variant>."""
        return self.root / stage / self.variant(stage)

    def tracking(self, stage: str) -> Tracking:
        """Say what wandb is to call a stage's run."""
        return Tracking(self.whole.wandb, self.whole.name, stage, self.variant(stage))

    def training_run(self, stage: str) -> Run:
        """Say how the training loop is to run this stage."""
        config = self.whole
        return Run(
            folder=self.folder(stage),
            fingerprint=from_main(self.fingerprint(stage) if is_main() else ""),
            name=stage,
            seed=config.seed,
            amp_dtype=getattr(torch, config.dtype),
            tracking=self.tracking(stage),
            config=self.relevant(stage),
            progress=self.progress,
            max_file_mb=config.max_file_mb,
        )
