"""Make the tokens of a data set once and memory-map them: no epoch pays for the encoder again.

The cache folder is keyed by the images and the tokenizer's weights. tokens.npy has one row per
image. Journals name the blocks of rows that are written, each with a checksum. An interrupted run
goes on where it stopped, and a block that is not as it was written is made anew. unreadable.txt
lists pictures that cannot be read. A run that finds another one at the same cache waits for it
(`alone`), and then finds what that one made.

Times are kept apart (`Seconds`): images per second of decoding and of encoding are what either
would do alone. The lower one is the bottleneck.

Legend: N images of the set, M of them readable, n images of a block, B batch, L tokens of all
scales, R image side.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from tqdm import tqdm

from dmoe_var.data.decoding import decoded
from dmoe_var.data.images import Images, Unreadable, scaled
from dmoe_var.distributed import from_main, gathered, is_main, rank, world_size
from dmoe_var.errors import DataError, InputError
from dmoe_var.files import alone, note, whole_file, write_text
from dmoe_var.models.vqvae import VQVAE

FORMAT = "dmoe-var-tokens/3"
TOKENS_FILE, JOURNAL, REPORT_FILE = "tokens.npy", "journal_{}.jsonl", "unreadable.txt"
BLOCK_IMAGES = 1024
"""Images per block: the most that an interrupted process encodes again."""

Policy = Literal["refuse", "skip"]
T = TypeVar("T")


def weights_hash(module: torch.nn.Module) -> str:
    """Hash a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Seconds:
    """Time of one encoding process, in seconds.

    decode: while its decoders read, decoded and cut, divided by their number.
    encode: while the VQ-VAE was at work, with the copies to its device and back.
    wait: while the encoder had nothing to do, because no batch was decoded.
    """

    decode: float = 0.0
    encode: float = 0.0
    wait: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.decode + other.decode, self.encode + other.encode, self.wait + other.wait
        )


@dataclass(frozen=True)
class About:
    """What it took to make a token set: images with tokens, pictures left out as unreadable, and
    the time, summed over blocks. data: what it was made of (see `Images.about`)."""

    images: int
    unreadable: int
    seconds: Seconds
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSet:
    """Memory-mapped tokens with their labels."""

    tokens_NL: np.ndarray
    """uint16."""
    labels_M: Tensor
    patch_nums: tuple[int, ...]
    about: About
    rows_M: np.ndarray | None = None
    """Indices of the readable images; None means all."""

    def __len__(self) -> int:
        return len(self.labels_M)

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L) and labels (B,) as LongTensors; indices are within 0..M - 1."""
        rows_B = indices_B.numpy()
        if self.rows_M is not None:
            rows_B = self.rows_M[rows_B]
        tokens_BL = torch.from_numpy(self.tokens_NL[rows_B].astype(np.int64))
        return tokens_BL, self.labels_M[indices_B]

    def by_scale(self, tokens_BL: Tensor) -> list[Tensor]:
        """Split tokens by scale, into (B, p*p) each."""
        return list(tokens_BL.split([p * p for p in self.patch_nums], dim=1))

    def teacher_forced(self, indices_B: Tensor, vqvae: VQVAE) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, L), labels (B,) and teacher input (B, L - 1, Cvae), where the VQ-VAE
        is."""
        device = vqvae.quantize.embedding.weight.device
        tokens_BL, labels_B = (t.to(device) for t in self.batch(indices_B))
        return tokens_BL, labels_B, vqvae.teacher_input(self.by_scale(tokens_BL))


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
    """Return the tokens of all images, from the cache if they are there.

    `workers` threads decode (0: this one); torchrun's processes share the blocks. Raise DataError
    for unreadable pictures, once all have been tried, unless they are to be skipped, and if none is
    readable. If they are refused, those of earlier runs are tried again: what kept them from being
    read may be gone.
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
        written = _from_main(store.written)  # the others need not read all rows for it
        kept = [each for each in written if unreadable == "skip" or not each.unreadable]
        done = {each.first for each in kept}
        missing = [block for block in store.blocks if block.start not in done]
        if missing:
            _from_main(lambda: store.begin(kept))
            mine = missing[rank() :: world_size()]
            made = gathered(store.make(vqvae, mine, batch_size, workers, progress))
            written = sorted(chain(kept, *made), key=lambda each: each.first)
            _from_main(lambda: store.finish(written))
        return store.opened(written, unreadable)


def _from_main(function: Callable[[], T]) -> T:
    """Call `function` in the main process; return its result, or raise its InputError, in all."""
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
class _Written:
    """A line of a journal: rows first..last - 1 are written, those of unreadable images as 0."""

    first: int
    last: int
    checksum: int
    unreadable: list[Unreadable]
    seconds: Seconds


LINE = TypeAdapter(_Written)


def _checksum(rows_nL: np.ndarray, unreadable: list[Unreadable]) -> int:
    return zlib.crc32(repr(unreadable).encode(), zlib.crc32(rows_nL.data))


@dataclass(frozen=True)
class _Store:
    """The cache folder of one set and one tokenizer."""

    folder: Path
    images: Images
    patch_nums: tuple[int, ...]

    @cached_property
    def blocks(self) -> list[range]:
        images = range(len(self.images))
        return [images[i : i + BLOCK_IMAGES] for i in images[::BLOCK_IMAGES]]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.images), sum(p * p for p in self.patch_nums)

    def tokens(self) -> np.ndarray | None:
        """Map the rows into memory; return None if the file is missing or something else."""
        try:
            tokens_NL = np.load(self.folder / TOKENS_FILE, mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            return None
        found = (tokens_NL.shape, tokens_NL.dtype, tokens_NL.flags.c_contiguous)
        return tokens_NL if found == (self.shape, np.uint16, True) else None

    def written(self) -> list[_Written]:
        """List the blocks that are there as they were written, in order; a note says how many are
        not."""
        found, tokens_NL = self._journalled(), self.tokens()
        intact = [
            each
            for each in found
            if tokens_NL is not None
            and each.checksum == _checksum(tokens_NL[each.first : each.last], each.unreadable)
        ]
        if len(intact) < len(found):
            damaged = f"{len(found) - len(intact)} of {len(self.blocks)} blocks"
            note(f"{self.folder}: damaged; {damaged} are made anew")
        return intact

    def _journalled(self) -> list[_Written]:
        found = {}
        for path in sorted(self.folder.glob(JOURNAL.format("*"))):
            for line in path.read_bytes().splitlines():
                with suppress(ValidationError):  # a line that a killed process left cut short
                    written = LINE.validate_json(line)
                    found[range(written.first, written.last)] = written
        return [found[block] for block in self.blocks if block in found]

    def begin(self, kept: Sequence[_Written]) -> None:
        """Write a journal of what is kept, and a file with room for all rows."""
        ours = self.folder / JOURNAL.format(0)
        write_text(ours, "".join(map(_line, kept)))
        for path in set(self.folder.glob(JOURNAL.format("*"))) - {ours}:
            path.unlink()
        if self.tokens() is None:
            with whole_file(self.folder / TOKENS_FILE) as temporary:
                np.lib.format.open_memmap(temporary, "w+", np.dtype(np.uint16), self.shape)

    def make(
        self, vqvae: VQVAE, blocks: Sequence[range], batch_size: int, workers: int, progress: bool
    ) -> list[_Written]:
        """Decode, encode and write blocks, one after the other."""
        made: list[_Written] = []
        rows: list[np.ndarray] = []
        unreadable: list[Unreadable] = []
        seconds = Seconds()
        total, shown = sum(map(len, blocks)), progress and is_main()
        with tqdm(total=total, desc="tokenize", unit="image", disable=not shown) as bar:
            for block, last, batch in decoded(self.images, blocks, batch_size, workers):
                started = time.perf_counter()
                rows.append(_encode(vqvae, batch.pixels_BRR3, self.shape[1]))
                encode_s = time.perf_counter() - started
                seconds += Seconds(batch.busy_s / max(1, workers), encode_s, batch.wait_s)
                unreadable += batch.unreadable
                bar.update(len(batch.pixels_BRR3) + len(batch.unreadable))
                if last:
                    made.append(self._write(block, np.concatenate(rows), unreadable, seconds))
                    rows, unreadable, seconds = [], [], Seconds()
        return made

    def _write(
        self, block: range, readable: np.ndarray, unreadable: list[Unreadable], seconds: Seconds
    ) -> _Written:
        """Write rows, then the line that vouches for them. readable: tokens of readable images."""
        N, L = self.shape
        rows_nL = np.zeros((len(block), L), np.uint16)
        broken = [each.index - block.start for each in unreadable]
        rows_nL[np.delete(np.arange(len(block)), broken)] = readable
        with (self.folder / TOKENS_FILE).open("r+b") as file:  # if mapped, a full disk would kill
            file.seek((block.start - N) * L * rows_nL.itemsize, os.SEEK_END)
            file.write(rows_nL.data)
        checksum = _checksum(rows_nL, unreadable)
        written = _Written(block.start, block.stop, checksum, unreadable, seconds)
        with (self.folder / JOURNAL.format(rank())).open("a", encoding="utf-8") as file:
            file.write(_line(written))
        return written

    def finish(self, written: Sequence[_Written]) -> None:
        """Write the report of unreadable pictures."""
        lines = [f"{path}\t{reason}\n" for path, reason in _reasons(written).items()]
        if lines:
            write_text(self.folder / REPORT_FILE, "".join(lines))
        else:
            (self.folder / REPORT_FILE).unlink(missing_ok=True)

    def opened(self, written: Sequence[_Written], unreadable: Policy) -> TokenSet:
        """Open the token set; raise DataError if pictures are refused or none is readable."""
        reasons = _reasons(written)
        broken = [item.index for each in written for item in each.unreadable]
        if broken and (unreadable == "refuse" or len(broken) == len(self.images)):
            path, reason = next(iter(reasons.items()))
            listed = f"first {path} ({reason}); all in {self.folder / REPORT_FILE}"
            if len(broken) == len(self.images):
                raise DataError(f"{len(reasons)} pictures, all unreadable, {listed}")
            remedy = "data.unreadable=skip leaves them out"
            raise DataError(f"{len(reasons)} unreadable pictures, {listed}; {remedy}")
        tokens_NL = self.tokens()
        assert tokens_NL is not None
        rows_M = np.delete(np.arange(len(self.images)), broken) if broken else None
        labels_M = torch.from_numpy(np.delete(self.images.labels, broken))
        seconds = sum((each.seconds for each in written), Seconds())
        about = About(len(labels_M), len(reasons), seconds, _from_main(self.images.about))
        return TokenSet(tokens_NL, labels_M, self.patch_nums, about, rows_M)


def _line(written: _Written) -> str:
    return LINE.dump_json(written).decode() + "\n"


def _reasons(written: Sequence[_Written]) -> dict[str, str]:
    """Map each unreadable picture's path to the reason; one may have several crops."""
    return {item.path: item.reason for each in written for item in each.unreadable}


@torch.no_grad()
def _encode(vqvae: VQVAE, pixels_BRR3: Tensor, num_tokens: int) -> np.ndarray:
    """Encode images, uint8 (B, R, R, 3), into tokens, uint16 (B, L)."""
    if len(pixels_BRR3) == 0:
        return np.empty((0, num_tokens), np.uint16)
    device = vqvae.quantize.embedding.weight.device
    tokens = vqvae.encode(scaled(pixels_BRR3.to(device)))
    tokens_BL: np.ndarray = torch.cat(tokens, dim=1).cpu().numpy().astype(np.uint16)
    return tokens_BL
