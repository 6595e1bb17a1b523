"""Where a stage works: its folder, what its result depends on, and whether it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmoe_var.checkpoints.load import file_dtype
from dmoe_var.config.root import Config
from dmoe_var.config.stages import BenchmarkConfig
from dmoe_var.devices import chosen_device
from dmoe_var.distributed import from_main, is_main, launched_processes
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.contents import (
    GIVEN,
    DataSet,
    Given,
    content,
    contents_of_files,
    hash_of,
    same_content,
    told,
)
from dmoe_var.experiment.record import RESULT_FILE, Record, whole_record
from dmoe_var.training.step import Run
from dmoe_var.training.tracking import Tracking

READING_PICTURES = ("train_vqvae", "train_var", "sparsify", "train_router", "calibrate")
"""Stages whose numbers depend on the content of the pictures themselves. Those of others depend on
the pictures that their models were made of."""

COMPARING = ("evaluate", "sweep")
"""Stages whose numbers depend on the content of a reference."""

ABSENT = "not at hand"

MEASURING = ("fidelity.", "evaluate.format")
"""How keys begin that say how images are measured or stored, not which they are."""

DEFAULT_VARIANT = "default"
MAX_NAME = 60
SHOWN = 16
"""Characters of a given file's hash, or of its name, in the name of a variant."""

EXPERTS = ("moe", "selection")
"""Sections that say nothing about a dense model."""

PRUNED = ("moe.scales", "pruning")
"""What a pruned point reads in their place."""

WITHOUT_ROUTER = ("oracle", "random", "all")
"""Selection rules for which no router has to be trained."""

POINTS = ("evaluate.num_samples", "evaluate.format")
"""What a sweep says about all of its points."""

READS: dict[str, tuple[str, ...]] = {
    "train_vqvae": ("seed", "dtype", "data", "vqvae", "base.vqvae", "train_vqvae"),
    "train_var": ("var", "base.var", "train_var"),
    "sparsify": ("sparsify", "conversion"),
    "split": ("split",),
    "train_router": ("train_router",),
    "sample": (*EXPERTS, "sampling", "sample", "vqvae", "base.vqvae", "var", "base.var"),
    "evaluate": (*EXPERTS, "sampling", "evaluate", "fidelity"),
    "export": (*EXPERTS, "export"),
    "calibrate": ("moe", "sampling", "calibrate"),
    "maps": (*EXPERTS, "sampling", "maps"),
    "benchmark": (
        "vqvae",
        "base.vqvae",
        "var",
        "base.var",
        *EXPERTS,
        "sampling",
        "evaluate.seed",
        "benchmark",
    ),
    "sweep": ("moe", "sampling", *POINTS, "fidelity", "sweep"),
    "report": (*EXPERTS, "sampling", *POINTS, "fidelity", "sweep", "report"),
    "figures": (
        "seed",
        "dtype",
        "data",
        "vqvae",
        "var",
        "base",
        "train_vqvae",
        "train_var",
        "conversion",
        "sparsify",
        "split",
        "train_router",
        *EXPERTS,
        "sampling",
        *POINTS,
        "fidelity",
        "sweep",
        "pruning",
        "sample",
        "benchmark",
        "calibrate",
        "maps",
        "figures",
    ),
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
    "benchmark": (),
    "export": ("train_router",),
    "calibrate": ("train_router",),
    "maps": ("train_router",),
    "report": ("train_router",),
    "figures": (),
}
"""The stages that each builds on."""

HOUSEKEEPING = (
    "log_every", "validate_every", "checkpoint_every",
    "micro_batch_size", "activation_checkpointing", "workers", "encode_batch", "root",
    "sweep.part", "sweep.parts",
    "figures.figure", "figures.make", "figures.plan",
    "sampling.batch_size", "fidelity.batch_size",
)  # fmt: skip
"""Keys that change no result, or only its rounding, by their last name or in full: a run may go on
with others. `data.root` is where the pictures are; which they are, their content says.
`sweep.part` is which points a run measures, not what they are."""

OF_A_SECTION = tuple(key for key in HOUSEKEEPING if "." in key)

OPTIONAL = ("selection.layer_tau", "evaluate.samples")
"""Keys that say nothing where they are empty."""


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

    @property
    def progress(self) -> bool:
        """Whether this process shows how far it is."""
        return self.config.progress and is_main()

    def needs(self, stage: str) -> tuple[str, ...]:
        """The stages that a stage builds on; a point needs no more than its model is made of."""
        if stage == "sample":
            return self._needs_of_pictures()
        if stage == "evaluate" and self.config.evaluate.samples is not None:
            return ()
        if stage == "benchmark" and self.config.benchmark.dynamic:
            return ("train_router",)
        return self._needs_of_point() if stage == "evaluate" else NEEDS[stage]

    def is_given(self, stage: str) -> bool:
        """Whether a stage only validates a base model that is given: others do without it."""
        given = {"train_vqvae": self.config.base.vqvae, "train_var": self.config.base.var}
        return given.get(stage) is not None

    def _needs_of_point(self) -> tuple[str, ...]:
        config = self.config
        if config.evaluate.model == "dynamic":
            return ("split",) if config.selection.rule in WITHOUT_ROUTER else NEEDS["evaluate"]
        sparse = config.evaluate.model == "pruned" and config.pruning.model == "sparse"
        return ("sparsify",) if sparse else ("train_var",)

    def _needs_of_pictures(self) -> tuple[str, ...]:
        """Nothing is validated for pictures: models that are given need no stage."""
        base, sample = self.config.base, self.config.sample
        if sample.pretrained is None and sample.model != "dense":
            return NEEDS["sample"]
        if sample.pretrained is None and base.var is None:
            return ("train_var",)
        return ("train_vqvae",) if base.vqvae is None else ()

    def check(self, stage: str) -> None:
        """ConfigError for what only this stage cannot do with the configuration."""
        if stage == "train_vqvae" and not self.is_given(stage) and launched_processes() > 1:
            raise ConfigError(
                f"train_vqvae trains in one process, torchrun started {launched_processes()}: run "
                "it by itself first, or give base.vqvae"
            )
        if stage in ("benchmark", "calibrate") and launched_processes() > 1:
            raise ConfigError(
                f"{stage} runs in one process, torchrun started {launched_processes()}"
            )
        if stage in COMPARING:
            self._check_measured()
        if stage in ("sweep", "figures", "report") and self.config.evaluate.samples is not None:
            raise ConfigError(
                f"evaluate.samples={self.config.evaluate.samples}: images that are given are "
                "measured by scripts/evaluate.py alone; allowed here: null"
            )
        if stage != "sweep":
            return
        if self.config.sweep.part is not None:
            raise ConfigError(
                f"sweep.part={self.config.sweep.part}: a part of a sweep is measured by "
                "scripts/sweep.py; allowed here: null, which joins all parts"
            )
        if self.config.evaluate.format == "png":
            raise ConfigError(
                "evaluate.format=png: a sweep's figures are drawn from samples.npz; allowed: npz, "
                "both"
            )
        allowed = sorted({1, len(self.config.moe.scales)})
        for name, taus in self.config.sweep.lists.items():
            if len(taus) not in allowed:
                raise ConfigError(
                    f"sweep.lists.{name}={list(taus)} must have {' or '.join(map(str, allowed))} "
                    "values, one for all or one for each of moe.scales"
                )

    def _check_measured(self) -> None:
        """ConfigError for what fidelity cannot be measured with."""
        samples = self.config.evaluate.samples
        if samples is not None and not Path(samples).expanduser().exists():
            raise ConfigError(
                f"evaluate.samples={samples}: no such file or folder; allowed: null, an .npz file "
                "of images (arr_0), a folder of images"
            )
        if self.config.sampling.more_smooth:
            raise ConfigError(
                "sampling.more_smooth=true is for pictures (scripts/sample.py) alone: fidelity is "
                "measured on images that were drawn without it; allowed here: false"
            )
        reference = self.config.fidelity.reference
        if reference is None and self.config.data.unreadable == "skip":
            raise ConfigError(
                "fidelity.reference=null compares with all training pictures, data.unreadable=skip "
                "leaves some out; allowed: a reference file or folder, or data.unreadable=refuse"
            )
        if reference is not None and not Path(reference).expanduser().exists():
            raise ConfigError(
                f"fidelity.reference={reference}: no such file or folder; allowed: null, an .npz "
                "reference file, a folder of images"
            )

    def _reads(self, stage: str, config: Config) -> tuple[str, ...]:
        if stage == "evaluate" and self.config.evaluate.samples is not None:
            return ("data", "evaluate.samples", "fidelity")
        models = {"evaluate": config.evaluate.model, "sample": config.sample.model}
        model = models.get(stage)
        unread: tuple[str, ...] = EXPERTS if model in ("dense", "pruned") else ()
        if stage == "sample" and self.config.sample.pretrained is not None:
            unread += ("var", "base.var")
        if stage == "benchmark":
            unread += _unread_by(config.benchmark)
        if getattr(config.base, stage.removeprefix("train_"), None) is not None:
            unread += (stage,)  # nothing is trained
        reads = tuple(key for key in READS[stage] if key not in unread)
        return (*PRUNED, *reads) if model == "pruned" else reads

    def relevant(self, stage: str, config: Config | None = None) -> dict[str, Any]:
        """Every key that a stage's result depends on, its own and those of what it builds on."""
        config = config or self.config
        keys: dict[str, Any] = {}
        for upstream in self.needs(stage):
            keys |= self.relevant(upstream, config)
        sections = self._reads(stage, config)
        within = tuple(f"{section}." for section in sections)
        for key, value in config.leaves.items():
            if key in sections or key.startswith(within):
                unsaid = key in OPTIONAL and not value
                kept = key.rpartition(".")[2] in HOUSEKEEPING or key.startswith(OF_A_SECTION)
                if not unsaid and not kept:
                    keys[key] = value
        return keys

    def fingerprint(self, stage: str, recorded: Mapping[str, str] | None = None) -> str:
        """Hash of all that a stage's result depends on, the content of given weights, pictures and
        references included; of this, what is not at hand counts as `recorded`."""
        content = {"weights": self.weights(stage), "contents": self.contents(stage, recorded)}
        return hash_of({**self._settings(stage), **content})

    def fingerprint_of_model(self, stage: str) -> str:
        """Hash of all that tells a stage's model from others at one time: no picture is looked
        at."""
        return hash_of({**self._settings(stage), "weights": self.weights(stage)})

    def fingerprint_of_images(self) -> str:
        """Hash of all that the images of an evaluation depend on; how they are measured or stored
        draws none again."""
        keys = {**self._settings("evaluate"), **self.weights("evaluate")}
        made_of = self._pictures_of_models("evaluate")
        kept = {k: value for k, value in keys.items() if not k.startswith(MEASURING)}
        return hash_of({**kept, **({"pictures": made_of} if made_of else {})})

    def contents(self, stage: str, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """Hashes by configuration key of what a stage is given beside weights: the pictures of
        `data`, a reference, samples of others.

        What is not at hand counts as `recorded`: records are read where the pictures are not.
        """
        found = {key: content(given, self.cache) for key, given in self._given(stage).items()}
        recorded = recorded or {}
        hashes = {key: value or recorded.get(key, ABSENT) for key, value in found.items()}
        made_of = None if "data" in hashes else self._pictures_of_models(stage)
        return {**hashes, **({"data": made_of} if made_of else {})}

    def _given(self, stage: str) -> dict[str, Given]:
        config = self.config
        places: dict[str, Given] = {}
        if stage in READING_PICTURES and config.data.kind == "image_folder":
            places["data"] = DataSet(config.data, config.var.num_classes, held_out=True)
        if stage not in COMPARING:
            return places
        named = {
            "fidelity.reference": config.fidelity.reference,
            "evaluate.samples": config.evaluate.samples,
        }
        places["fidelity.reference"] = DataSet(config.data, config.var.num_classes, held_out=False)
        for key, value in named.items():
            if value is not None:
                places[key] = Path(value).expanduser()
        return places

    def _pictures_of_models(self, stage: str) -> str | None:
        """Hash of the pictures that the models which a stage builds on were trained on, where they
        have been, by their records."""
        for upstream in self.needs(stage):
            path, given = self.folder(upstream) / RESULT_FILE, self.is_given(upstream)
            record = None if given else whole_record(path, f"{upstream} is not done")
            if record is not None and "data" in record.weights:
                return record.weights["data"]
            if (earlier := self._pictures_of_models(upstream)) is not None:
                return earlier
        return None

    def _settings(self, stage: str) -> dict[str, Any]:
        """What a stage depends on, but for the places of given files."""
        return {k: v for k, v in self.relevant(stage).items() if k not in GIVEN}

    def weights(self, stage: str) -> dict[str, str]:
        """SHA-256 of the files that a stage depends on, where they are given, by configuration key.
        CheckpointError where one cannot be found or fetched."""
        keys = self.relevant(stage)
        found: dict[str, str] = {}
        for key in GIVEN:
            if keys.get(key) is not None:
                found |= contents_of_files(key, keys[key])
        return found

    def weights_dtype(self, stage: str) -> dict[str, str]:
        """The precision that base models have in their files, by configuration key."""
        given = {"vqvae": self.config.base.vqvae, "var": self.config.base.var}
        keys = self.relevant(stage)
        return {
            f"base.{kind}": file_dtype(source, kind)
            for kind, source in given.items()
            if source is not None and f"base.{kind}" in keys
        }

    def differing(self, stage: str, record: Record) -> list[str]:
        """In what a record was made otherwise than a stage would be now, a line a key. Given files
        differ by their content."""
        ours, theirs = self.relevant(stage), record.config
        weights = self.weights(stage)
        others = [
            f"{key} has other content than there"
            for key, value in self.contents(stage, record.weights).items()
            if value != record.weights.get(key)
        ]
        return others + [
            f"{key} is {ours[key]}, there {theirs.get(key)}"
            for key in sorted(ours)
            if (
                weights.get(key) != record.weights.get(key)
                if key in GIVEN
                else theirs.get(key) != ours[key]
            )
        ]

    def variant(self, stage: str) -> str:
        """`default`, or a short name with a hash of what differs from the experiment's own.

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
        """runs/<experiment>/<stage>/<variant>."""
        return self.root / stage / self.variant(stage)

    def tracking(self, stage: str) -> Tracking:
        """What wandb is to call a stage's run."""
        return Tracking(self.config.wandb, self.config.name, stage, self.variant(stage))

    def training_run(self, stage: str) -> Run:
        """How the training loop is to run this stage."""
        config = self.config
        return Run(
            folder=self.folder(stage),
            fingerprint=from_main(self.fingerprint(stage) if is_main() else ""),
            name=stage,
            seed=config.seed,
            amp_dtype=getattr(torch, config.dtype),
            tracking=self.tracking(stage),
            config=self.relevant(stage),
            progress=self.progress,
        )


def _unread_by(benchmark: BenchmarkConfig) -> tuple[str, ...]:
    """Sections that say nothing about what is timed."""
    if benchmark.kernels and not benchmark.real_masks:
        return ("vqvae", "base.vqvae", "base.var", "evaluate.seed", "selection")
    if not benchmark.dynamic:
        return EXPERTS
    return () if benchmark.chosen else ("selection",)
