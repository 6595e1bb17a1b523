"""A shard of the token cache: shard_00000.npy, and beside it shard_00000.json that vouches for it.

Legend: N images of the whole set, n images of a shard that are readable, L tokens of all scales.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from dmoe_var.data.images import Unreadable
from dmoe_var.errors import DataError
from dmoe_var.files import sha256_of, whole_file, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SHARD_IMAGES = 8192
MOST_SHARDS = 512
"""Every memory-mapped file holds a descriptor, and processes often have no more than 1024."""

Content = TypeVar("Content")


@dataclass(frozen=True)
class Seconds:
    """Time of one encoding process, in seconds.

    decode: its decoders were busy reading, decoding and cutting, divided by their number.
    encode: the VQ-VAE was at work, with the copies to its device and back.
    wait: the encoder had nothing to do, for no batch was decoded.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    decode: float = 0.0
    encode: float = 0.0
    wait: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.decode + other.decode, self.encode + other.encode, self.wait + other.wait
        )


@dataclass(frozen=True)
class ShardAbout:
    """What a shard was made of: images first..last - 1, of which those in `unreadable` have no
    row; and what it took."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    first: int
    last: int
    sha256: str
    unreadable: list[Unreadable]
    seconds: Seconds

    @property
    def rows(self) -> int:
        return self.last - self.first - len(self.unreadable)


@dataclass(frozen=True)
class Shard:
    """The shard of images first..last - 1."""

    folder: Path
    number: int
    first: int
    last: int

    @property
    def tokens_file(self) -> Path:
        return self.folder / f"shard_{self.number:05d}.npy"

    @property
    def about_file(self) -> Path:
        return self.tokens_file.with_suffix(".json")

    def write(self, tokens_nL: np.ndarray, unreadable: list[Unreadable], seconds: Seconds) -> None:
        """Tokens first: a shard without its .json does not count."""
        self.about_file.unlink(missing_ok=True)
        with whole_file(self.tokens_file) as temporary, temporary.open("wb") as file:
            np.save(file, tokens_nL, allow_pickle=False)
        digest = sha256_of(self.tokens_file)
        about = ShardAbout(self.first, self.last, digest, unreadable, seconds)
        write_json(self.about_file, about)

    def is_made(self) -> bool:
        return self.tokens_file.exists() and self.about_file.exists()

    def about(self) -> ShardAbout:
        """DataError where the .json is broken, or of other images than this shard's."""
        about = read_json(self.about_file, ShardAbout)
        within = range(self.first, self.last)
        if (about.first, about.last) != (self.first, self.last) or not all(
            item.index in within for item in about.unreadable
        ):
            raise DataError(
                f"{self.about_file}: of images {about.first}..{about.last - 1} or others, expected "
                f"{self.first}..{self.last - 1}; {remedy('it')}"
            )
        return about

    def check(self, sha256: str) -> None:
        """DataError where the tokens are not those that were written."""
        try:
            found = sha256_of(self.tokens_file)
        except OSError as error:
            raise DataError(f"{self.tokens_file}: cannot be read ({error.strerror})") from error
        if found != sha256:
            raise DataError(
                f"{self.tokens_file}: changed since it was written (SHA-256 {found[:12]}..., "
                f"expected {sha256[:12]}...); {remedy('it')}"
            )

    def open(self, rows: int, num_tokens: int) -> np.ndarray:
        """Memory-mapped tokens uint16 (n, L). DataError where the file holds anything else."""
        path, expected = self.tokens_file, (rows, num_tokens)
        tokens_nL = load_array(path)
        if tokens_nL.shape != expected or tokens_nL.dtype != np.uint16:
            found = f"{tokens_nL.dtype} {tokens_nL.shape}"
            raise DataError(f"{path}: holds {found}, expected uint16 {expected}; {remedy('it')}")
        return tokens_nL


def plan(folder: Path, num_images: int) -> list[Shard]:
    """The shards of a set, all but the last of one size."""
    size = max(SHARD_IMAGES, -(-num_images // MOST_SHARDS))
    return [
        Shard(folder, number, first, min(first + size, num_images))
        for number, first in enumerate(range(0, num_images, size))
    ]


def load_array(path: Path) -> np.ndarray:
    """A memory-mapped .npy file. DataError where it is missing, cut short or something else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cut short or no .npy file ({reason}); {remedy('it')}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: no .npy file; {remedy('it')}")
    return array


def write_json(path: Path, content: DataclassInstance) -> None:
    """Write a dataclass, whole or not at all."""
    write_text(path, json.dumps(asdict(content), indent=1) + "\n")


def read_json(path: Path, kind: type[Content]) -> Content:
    """A dataclass that `write_json` wrote. DataError where the file is broken."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"])) or "content"
        raise DataError(f"{path}: {key}: {wrong['msg']}; {remedy('it')}") from error


def remedy(what: str) -> str:
    """What to do about a broken file of the cache."""
    return f"remove {what} to have it made again"
