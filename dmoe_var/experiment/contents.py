"""Tell what stages are given by content: weights, pictures, a reference, samples of others.

A path says where something lies, not what: files are overwritten in place, folders lose pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe_var.checkpoints.load import cached_file, is_name, weights_file
from dmoe_var.checkpoints.safetensors_io import CONFIG_FILE, MODEL_FILE
from dmoe_var.config.root import Config
from dmoe_var.data import load_data
from dmoe_var.data.config import DataConfig
from dmoe_var.errors import CheckpointError, InputError
from dmoe_var.experiment.stage import Stage
from dmoe_var.files import sha256_of
from dmoe_var.metrics.image_files import content_sha256
from dmoe_var.metrics.reference import HASHES


@dataclass(frozen=True)
class DataSet:
    """A data set, labelled for a model of num_classes classes."""

    config: DataConfig
    num_classes: int
    held_out: bool
    """Whether the held-out images count as well as the training images."""


Given = Path | DataSet

GIVEN = (
    "base.vqvae", "base.var", "base.classifier", "train_var.start", "tune_experts.start",
    "drafter.var", "sample.pretrained", "fidelity.weights",
)  # fmt: skip
"""Keys that name files. Their content counts, and not where they lie."""
MODELS = ("base.vqvae", "base.var", "train_var.start", "tune_experts.start", "drafter.var")
"""Those of them that may name a published model."""
_HELD: ContextVar[dict[tuple[Given, Path], str] | None] = ContextVar("held", default=None)
"""Contents that one thread holds: runs in two threads end in any order."""


def given(stage: Stage, config: Config) -> dict[str, Given]:
    """List what a stage is given beside weights, by configuration key."""
    places: dict[str, Given] = {}
    num_classes = config.var.num_classes
    if stage.reads_pictures and config.data.kind == "image_folder":
        places["data"] = DataSet(config.data, num_classes, held_out=True)
    if not stage.compares:
        return places
    places["fidelity.reference"] = DataSet(config.data, num_classes, held_out=False)
    for key in ("fidelity.reference", "evaluate.samples"):
        if (path := config.leaves[key]) is not None:
            places[key] = Path(path).expanduser()
    return places


@contextmanager
def held() -> Iterator[None]:
    """Look at each content only once within. All points of a run see one state of it, and a folder
    of a million pictures is not listed for each."""
    within = _HELD.get()
    outside = _HELD.set({} if within is None else within)
    try:
        yield
    finally:
        _HELD.reset(outside)


def content(given: Given, cache: Path) -> str | None:
    """Hash what is given. Return None if it is not at hand, or cannot be read and whoever reads it
    for its work says so. Raise InputError for a folder of pictures that is there and broken: no
    record is of it."""
    at, held = (given, cache), _HELD.get()
    if held is not None and at in held:
        return held[at]
    try:
        if isinstance(given, DataSet):
            sets = load_data(given.config, given.num_classes, hashes=cache / HASHES, fetch=False)
            found = " ".join(images.key for images in (sets if given.held_out else sets[:1]))
        else:
            found = content_sha256(given, cache / HASHES)
    except (InputError, OSError):
        if isinstance(given, DataSet) and _is_there(given.config):
            raise
        return None
    if held is not None:
        held[at] = found
    return found


def _is_there(config: DataConfig) -> bool:
    """Tell whether a data set of picture files has a folder that is not empty."""
    if config.kind != "image_folder" or config.root is None:
        return False
    root = Path(config.root).expanduser()
    return root.exists() and not (root.is_dir() and next(root.iterdir(), None) is None)


@contextmanager
def naming(key: str | None, source: str | Path | None) -> Iterator[None]:
    """Name the key in errors about the model that it gives, if it gives one."""
    try:
        yield
    except CheckpointError as error:
        text, given = str(error), f"{key}={source}"
        if source is None or text.startswith(given):
            raise
        begins = text.startswith(str(source))
        raise CheckpointError(f"{key}={text}" if begins else f"{given}: {text}") from error


def contents_of_files(key: str, source: str) -> dict[str, str]:
    """Hash the files that a key names with SHA-256. They are fetched if they have to be."""
    if key == "fidelity.weights":
        return {key: sha256_of(Path(source))}
    if key != "sample.pretrained":
        with naming(key, source):
            return {key: sha256_of(weights_file(source, kind_of(key)))}
    from dmoe_var.checkpoints.pretrained import locate  # imports the hub's client: half a second

    with naming(key, source):
        folder = locate(source)
    files = {key: folder / MODEL_FILE, f"{key}.config": folder / CONFIG_FILE}
    return {name: sha256_of(path) for name, path in files.items() if path.is_file()}


def kind_of(key: str) -> str:
    """Return the kind of model, "vqvae" or "var", that a key names."""
    return "var" if key.endswith(".start") else key.rpartition(".")[2]


def _known(key: str, source: str | None) -> dict[str, str] | None:
    """Hash the files that a key names on this machine; None if they are missing or unreadable."""
    try:
        if source is None:
            return None
        if key in MODELS:
            file = cached_file(source, kind_of(key))
            return None if file is None else {key: sha256_of(file)}
        return contents_of_files(key, source) if Path(source).expanduser().exists() else None
    except (CheckpointError, OSError, ValueError):  # whoever reads it says what is wrong with it
        return None


def same_content(key: str, one: Any, other: Any) -> bool:
    """Tell whether two values of a key name the same files, with content known on this machine."""
    return key in GIVEN and (known := _known(key, one)) is not None and known == _known(key, other)


def told(key: str, value: Any) -> Any:
    """Return what stands for a value in a variant's name: for files, their content or the name
    that they are fetched by."""
    if key not in GIVEN or value is None or is_name(value):
        return value
    known = _known(key, value)
    return value if known is None else hash_of(known)


def hash_of(content: Mapping[str, Any]) -> str:
    """Hash what JSON can hold to sixteen hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
