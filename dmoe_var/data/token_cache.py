"""Tokens of a data set, made once and memory-mapped: no epoch pays the encoder again.

The cache folder is keyed by the images and the tokenizer's weights. It holds shards, each made by
one process and each appearing whole, so that an interrupted run goes on where it stopped;
labels.npy; unreadable.txt where pictures were unreadable; and at last index.json. A run that finds
another one at the same cache waits for it (`alone`), and then finds what that one made.

Times are kept apart (`Seconds`): images a second of decoding and of encoding are what either
would do alone, the lower one the bottleneck.

Legend: N images of the set, M of them with tokens, B batch, L tokens of all scales, R image side.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor
from tqdm import tqdm

from dmoe_var.data.decoding import decoded
from dmoe_var.data.images import Images, Unreadable, scaled
from dmoe_var.data.token_shards import (
    Seconds,
    Shard,
    load_array,
    plan,
    read_json,
    remedy,
    write_json,
)
from dmoe_var.distributed import barrier, from_main, gathered, is_main, rank, world_size
from dmoe_var.errors import DataError, InputError
from dmoe_var.files import alone, whole_file, write_text
from dmoe_var.models.vqvae import VQVAE

FORMAT = "dmoe-var-tokens/2"
INDEX_FILE, LABELS_FILE, REPORT_FILE = "index.json", "labels.npy", "unreadable.txt"

Policy = Literal["refuse", "skip"]
T = TypeVar("T")


def weights_hash(module: torch.nn.Module) -> str:
    """Hash of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class About:
    """What it took to make a token set: images with tokens, pictures left out as unreadable, and
    the time, summed over shards. And what it was made of (see `Images.about`)."""

    images: int
    unreadable: int
    seconds: Seconds
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSet:
    """Memory-mapped tokens, shard by shard, with their labels."""

    shards: tuple[np.ndarray, ...]
    """Each uint16 (its images, L)."""
    labels_M: Tensor
    patch_nums: tuple[int, ...]
    about: About

    def __len__(self) -> int:
        return len(self.labels_M)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each shard's rows end."""
        return np.cumsum([len(shard) for shard in self.shards])

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) as LongTensors; indices within 0..M - 1."""
        rows_B = indices_B.numpy()
        shard_B = np.searchsorted(self._ends, rows_B, side="right")
        tokens_BL = np.empty((len(rows_B), sum(p * p for p in self.patch_nums)), np.int64)
        for number in np.unique(shard_B):
            here_B = shard_B == number
            first = self._ends[number] - len(self.shards[number])
            tokens_BL[here_B] = self.shards[number][rows_B[here_B] - first]
        return torch.from_numpy(tokens_BL), self.labels_M[indices_B]

    def by_scale(self, tokens_BL: Tensor) -> list[Tensor]:
        """The tokens of each scale, (B, p*p)."""
        return list(tokens_BL.split([p * p for p in self.patch_nums], dim=1))


@dataclass(frozen=True)
class _ShardEntry:
    __pydantic_config__ = ConfigDict(extra="forbid")

    rows: int
    sha256: str


@dataclass(frozen=True)
class _Index:
    """index.json: what the cache holds. `left_out`: images without a row, in order."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: str
    images: str
    num_tokens: int
    shards: list[_ShardEntry]
    left_out: list[int]
    unreadable: int
    first_unreadable: str
    seconds: Seconds

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


def tokenize(
    images: Images,
    vqvae: VQVAE,
    cache: Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    unreadable: Policy = "refuse",
    progress: bool = True,
) -> TokenSet:
    """Tokens of all images, from the cache where they are there.

    `workers` threads decode (0: this one); torchrun's processes share the shards. Raises
    DataError for a cache file that is not what its key says; for unreadable pictures, once all
    have been tried, unless they are to be skipped; and where none is readable.
    """
    if vqvae.config.vocab_size > 2**16:
        raise DataError(f"vocab_size={vqvae.config.vocab_size}: the token cache holds uint16")
    shape = json.dumps(asdict(vqvae.config))
    identity = FORMAT + shape + weights_hash(vqvae)
    tokenizer = hashlib.sha256(identity.encode()).hexdigest()[:16]
    key = _from_main(lambda: images.key)  # the main process alone reads the files for it
    folder = cache / f"{key}-{tokenizer}"
    folder.mkdir(parents=True, exist_ok=True)
    store = _Store(folder, images, vqvae.config.patch_nums)
    with alone(folder) if is_main() else nullcontext():
        missing = _from_main(lambda: store.begin(unreadable))
        if missing is not None:
            store.make(vqvae, missing[rank() :: world_size()], batch_size, workers, progress)
            barrier()
            _from_main(store.finish)
        return store.open(unreadable)


def _from_main(function: Callable[[], T]) -> T:
    """What `function` gives in the main process, in every process; so with its InputError."""
    results: list[T] = []
    problem: InputError | None = None
    if is_main():
        try:
            results.append(function())
        except InputError as error:
            problem = error
    results, problem = from_main((results, problem))
    if problem is not None:
        raise problem
    return results[0]


@dataclass(frozen=True)
class _Store:
    """The cache folder of one set and one tokenizer."""

    folder: Path
    images: Images
    patch_nums: tuple[int, ...]

    @cached_property
    def shards(self) -> list[Shard]:
        return plan(self.folder, len(self.images))

    @property
    def num_tokens(self) -> int:
        return sum(p * p for p in self.patch_nums)

    @property
    def index_file(self) -> Path:
        return self.folder / INDEX_FILE

    @property
    def report_file(self) -> Path:
        return self.folder / REPORT_FILE

    def begin(self, unreadable: Policy) -> list[Shard] | None:
        """The shards to make; None where the whole cache is there.

        Where unreadable pictures are refused, those of earlier runs are tried again: what kept
        them from being read may be gone.
        """
        missing = [
            shard
            for shard in self.shards
            if not shard.is_made() or (unreadable == "refuse" and shard.about().unreadable)
        ]
        files = (self.index_file, self.folder / LABELS_FILE)
        if not missing and all(file.exists() for file in files):
            return None
        self.index_file.unlink(missing_ok=True)
        return missing

    def make(
        self, vqvae: VQVAE, shards: Sequence[Shard], batch_size: int, workers: int, progress: bool
    ) -> None:
        """Decode, encode and write shards, one after the other."""
        rows: list[np.ndarray] = []
        unreadable: list[Unreadable] = []
        seconds = Seconds()
        total = sum(shard.last - shard.first for shard in shards)
        shown = progress and is_main()
        with tqdm(total=total, desc="tokenize", unit="image", disable=not shown) as bar:
            for shard, last, batch in decoded(self.images, shards, batch_size, workers):
                started = time.perf_counter()
                rows.append(_encode(vqvae, batch.pixels_BRR3, self.num_tokens))
                encode_s = time.perf_counter() - started
                seconds += Seconds(batch.busy_s / max(1, workers), encode_s, batch.wait_s)
                unreadable += batch.unreadable
                bar.update(len(batch.pixels_BRR3) + len(batch.unreadable))
                if last:
                    shard.write(np.concatenate(rows), unreadable, seconds)
                    rows, unreadable, seconds = [], [], Seconds()

    def finish(self) -> None:
        """Write the report of unreadable pictures, the labels and the index."""
        abouts = [shard.about() for shard in self.shards]
        broken = [item for about in abouts for item in about.unreadable]
        reasons = {item.path: item.reason for item in broken}
        lines = [f"{path}\t{reason}" for path, reason in reasons.items()]
        if lines:
            write_text(self.report_file, "\n".join(lines) + "\n")
        else:
            self.report_file.unlink(missing_ok=True)
        left_out = [item.index for item in broken]
        with whole_file(self.folder / LABELS_FILE) as temporary, temporary.open("wb") as file:
            np.save(file, np.delete(self.images.labels, left_out), allow_pickle=False)
        index = _Index(
            format=FORMAT,
            images=self.images.key,
            num_tokens=self.num_tokens,
            shards=[_ShardEntry(about.rows, about.sha256) for about in abouts],
            left_out=left_out,
            unreadable=len(reasons),
            first_unreadable=lines[0].replace("\t", " (") + ")" if lines else "",
            seconds=sum((about.seconds for about in abouts), Seconds()),
        )
        write_json(self.index_file, index)

    def open(self, unreadable: Policy) -> TokenSet:
        """The token set; DataError where a file is not as written, or pictures are refused."""
        index = _from_main(self._index)
        listed = f"first {index.first_unreadable}; all in {self.report_file}"
        if index.rows == 0:
            raise DataError(f"{index.unreadable} pictures, all unreadable, {listed}")
        if index.unreadable and unreadable == "refuse":
            raise DataError(
                f"{index.unreadable} unreadable pictures, {listed}; data.unreadable=skip leaves "
                "them out"
            )
        data = _from_main(self.images.about)
        problem = ""
        try:
            shards = tuple(self._shards(index))
            labels_M = self._labels(index)
        except DataError as error:
            problem = str(error)
        for found in gathered(problem):
            if found:
                raise DataError(found)
        about = About(index.rows, index.unreadable, index.seconds, data)
        return TokenSet(shards, torch.from_numpy(labels_M), self.patch_nums, about)

    def _index(self) -> _Index:
        path = self.index_file
        index = read_json(path, _Index)
        ours = (FORMAT, self.images.key, self.num_tokens, len(self.shards))
        theirs = (index.format, index.images, index.num_tokens, len(index.shards))
        if ours != theirs:
            raise DataError(f"{path}: of {theirs}, expected {ours}; {remedy('it')}")
        images = range(len(self.images))
        left_out = [image for image in index.left_out if image in images]
        if index.rows + len(left_out) != len(images):
            found = f"{index.rows} rows and {len(left_out)} images left out"
            raise DataError(f"{path}: {found}, expected {len(images)} in all; {remedy('it')}")
        return index

    def _shards(self, index: _Index) -> Iterator[np.ndarray]:
        """The shards, each checksum verified by one of the processes."""
        for shard, entry in zip(self.shards, index.shards, strict=True):
            tokens_nL = shard.open(entry.rows, self.num_tokens)
            if shard.number % world_size() == rank():
                shard.check(entry.sha256)
            yield tokens_nL

    def _labels(self, index: _Index) -> np.ndarray:
        path = self.folder / LABELS_FILE
        labels_M = np.delete(self.images.labels, index.left_out)
        if not np.array_equal(load_array(path), labels_M):
            raise DataError(f"{path}: not the labels of these images; {remedy('it')}")
        return labels_M


@torch.no_grad()
def _encode(vqvae: VQVAE, pixels_BRR3: Tensor, num_tokens: int) -> np.ndarray:
    """Tokens uint16 (B, L) of images uint8 (B, R, R, 3)."""
    if len(pixels_BRR3) == 0:
        return np.empty((0, num_tokens), np.uint16)
    device = vqvae.quantize.embedding.weight.device
    tokens = vqvae.encode(scaled(pixels_BRR3.to(device)))
    tokens_BL: np.ndarray = torch.cat(tokens, dim=1).cpu().numpy().astype(np.uint16)
    return tokens_BL
