"""Read and write result.json, one schema for all measurements. Figures and tables read it alone."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dmoe_var.errors import DataError
from dmoe_var.files import note, read_json, write_text
from dmoe_var.values import take_fields

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn", "fvcore", "torch-fidelity")
RESULT_FILE = "result.json"


class OtherSchema(DataError):
    """A record is whole, but of another version of the schema: it must not be written over."""


@dataclass(frozen=True)
class Record:
    """What a stage measured and all that it takes to measure it again.

    metrics: flat name -> number, the unit in the name. fingerprint: a hash of the configuration
    that the stage and those it builds on depend on.
    """

    stage: str
    variant: str
    fingerprint: str
    metrics: Mapping[str, float]
    config: Mapping[str, Any]
    seed: int
    num_samples: int
    dtype: str
    started: str
    ended: str
    device: str
    threads: int
    git_commit: str
    libraries: Mapping[str, str]
    processes: int = 1
    weights: Mapping[str, str] = field(default_factory=dict)
    """SHA-256, by configuration key, of the files that base models came from, and of what images
    were compared with (the training images: their key)."""
    weights_dtype: Mapping[str, str] = field(default_factory=dict)
    """The precision of base models in those files, by configuration key; `dtype` is what ran."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What is not a number: file names, tau lists, sources of weights."""
    schema_version: int = SCHEMA_VERSION

    @property
    def is_tuned(self) -> bool:
        """Whether experts are tuned by its configuration."""
        return any(self.config.get(f"tune_experts.{key}") for key in ("steps", "epochs"))

    def write(self, folder: Path) -> None:
        """Write folder/result.json, whole or not at all."""
        write_text(folder / RESULT_FILE, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a stored record. Raise DataError if the file is missing or broken, its subclass
        OtherSchema if another version of this program wrote it."""
        content = read_json(path, DataError)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            kind = OtherSchema if type(version) is int else DataError
            raise kind(f"{path}: schema_version={version}, expected {SCHEMA_VERSION}")
        try:
            record = cls(**content)
            take_fields(record)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: {error}") from error
        return record


def whole_record(path: Path, otherwise: str) -> Record | None:
    """Read a stored record. Return None if there is none, as another run may remove it any time, or
    if a crash left something else, with a note that ends with `otherwise`. Raise DataError if
    another version of this program wrote it, or if it may be whole but could not be read."""
    try:
        return Record.read(path)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if isinstance(error, OtherSchema) or isinstance(error.__cause__, OSError):
            raise
        note(f"{error}; {otherwise}")
        return None


def now() -> str:
    """Tell the time in UTC, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@cache
def git_commit() -> str:
    """Find the commit of the source tree, with "+" if files differ from it; "unknown" if git does
    not track this very file, which may be installed into a folder of another repository."""
    source = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def library_versions() -> dict[str, str]:
    """List the versions of what numbers depend on; "absent" for what is not installed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions
