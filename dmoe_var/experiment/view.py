"""Show the configuration as one stage may read it: a key that it did not declare raises.

A result then depends on nothing but what its fingerprint says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import accumulate
from typing import Any, cast

from dmoe_var.config.root import Config

TRAININGS = (
    "train_vqvae", "train_var", "sparsify", "train_router", "tune_experts", "train_classifier",
)  # fmt: skip
HOUSEKEEPING = (
    "name", "run_dir", "device", "threads", "deterministic", "wandb", "progress",
    "max_file_mb",
    "data.root", "data.workers", "data.encode_batch", "data.in_memory", "data.class_names",
    *(
        f"{stage}.{key}"
        for stage in TRAININGS
        for key in ("log_every", "validate_every", "checkpoint_every", "micro_batch_size")
    ),
    "train_var.snapshot_every",
    "train_var.activation_checkpointing", "sparsify.activation_checkpointing",
    "sampling.batch_size", "sampling.cuda_graphs", "fidelity.batch_size",
    "sweep.part", "sweep.parts",
    "figures.figure", "figures.make", "figures.plan",
)  # fmt: skip
"""Keys that change no result, or only its rounding. Every stage may read them, and a run may go on
with other values. `data.root` says where the pictures are, not which they are; `sweep.part` says
which points a run measures, not what they are."""

OFF: tuple[Any, ...] = (None, False, 0.0, [], "none", "zero")
OPTIONAL = {
    **{key: key for key in ("selection.layer_tau", "evaluate.samples", "data.flip", "moe.skipped")},
    **{key: key for key in ("sampling.int8", "sampling.temperature")},
    **{key: key for key in ("base.classifier", "fidelity.classifier", "train_router.condition")},
    **{key: key for key in ("train_var.start", "train_var.scale_weights")},
    **{key: key for key in ("tune_experts.start", "tune_experts.blocks")},
    **{f"{stage}.ema": f"{stage}.ema" for stage in TRAININGS},
    **{key: key for key in ("sparsify.distill", "tune_experts.distill", "tune_experts.guidance")},
    "calibrate.temperature": "calibrate.temperature",
    **{key: key for key in ("find_recipe.cfg", "find_recipe.drafted")},
    "moe.mean_images": "moe.skipped",
    "drafter": "drafter.var",
    "sampling.skipping": "sampling.skipping.ratios",
    "sampling.heads": "sampling.heads.ratios",
}
"""Keys and sections that say nothing if a key, their own or one of theirs, is OFF."""


class UndeclaredRead(RuntimeError):
    """A stage read a key that it did not declare: a fault of its file, not of the configuration."""


def within(key: str, keys: Collection[str]) -> bool:
    """Tell whether a dotted key is one of these, or lies below one."""
    return any(place in keys for place in _places(key))


@cache
def _places(key: str) -> tuple[str, ...]:
    """List a dotted key and all that it lies below."""
    return tuple(accumulate(key.split("."), "{}.{}".format))


def optional(key: str) -> bool:
    """Tell whether a key may say nothing."""
    return any(within(key, (place,)) for place in OPTIONAL)


def says(key: str, leaves: Mapping[str, Any]) -> bool:
    """Tell whether a key says something among all keys and their values."""
    switches = (switch for place, switch in OPTIONAL.items() if within(key, (place,)))
    return all(leaves.get(switch) not in OFF for switch in switches)


def view(config: Config, stage: str, declared: Iterable[str]) -> Config:
    """Wrap the configuration so that `stage` may read the declared keys and sections."""
    return cast(Config, _View(config, "", stage, (*declared, *HOUSEKEEPING)))


class _View:
    """A section of which a stage may read some keys. Sections that it may read in full are handed
    out as they are; properties see no more than the view shows."""

    def __init__(self, section: Any, place: str, stage: str, allowed: tuple[str, ...]):
        self._section = section
        self._place = place
        self._stage = stage
        self._allowed = allowed

    __dataclass_fields__ = property(lambda self: self._section.__dataclass_fields__)
    """Makes `replace` and `asdict`, which read every key, raise the same error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._section.__dataclass_fields__:
            return getattr(type(self._section), name).__get__(self)
        value, key = getattr(self._section, name), f"{self._place}{name}"
        if self._may_read(key, value):
            return value
        if is_dataclass(value) and any(each.startswith(f"{key}.") for each in self._allowed):
            return _View(value, f"{key}.", self._stage, self._allowed)
        raise UndeclaredRead(
            f"{self._stage} reads {key}, which it does not declare: its result would be taken for "
            f"that of another value; name it in `reads` of dmoe_var/stages/{self._stage}.py"
        )

    def _may_read(self, key: str, value: Any) -> bool:
        if within(key, self._allowed):
            return True
        return is_dataclass(value) and all(
            self._may_read(f"{key}.{each.name}", getattr(value, each.name))
            for each in fields(value)
        )
