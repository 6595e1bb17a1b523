"""Write and read files of named tensors: whole or not at all, and in pieces where files have to be
small.

A file is a safetensors file. With a limit, what does not fit lies in pieces beside it, which are
safetensors files too and named after their content. The file holds their hashes and gets its name
last, so that a kill leaves the old tensors or the new ones, and its own hash covers all of them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from dmoe_var.checkpoints.file_kinds import kind_of_file
from dmoe_var.errors import CheckpointError
from dmoe_var.files import sha256_of, whole_file
from dmoe_var.models.build import _first_line

PIECES = "pieces"
"""Name of the one entry of a file's metadata that tells its pieces and all else."""
MB = 10**6
ENTRY = 160
"""Most bytes by which a tensor, beside its name, or a piece lengthens the header of a file."""
Metadata = Mapping[str, str]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Metadata, max_mb: int | None = None
) -> None:
    """Write named tensors. Raise CheckpointError or OSError if the disk refuses.

    max_mb: most megabytes per file; None does not limit it. A tensor that is larger is cut.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    first, *further = _packs(contiguous, metadata, max_mb)
    keep_pieces(path, _present(path))  # a kill may have left others
    digests: list[str] = []
    try:
        for pack in further:
            content = save(pack)
            digests.append(hashlib.sha256(content).hexdigest())
            with whole_file(_piece(path, digests[-1])) as temporary:
                temporary.write_bytes(content)
        stored = {name for pack in (first, *further) for name in pack}
        cut = {name: list(t.shape) for name, t in contiguous.items() if name not in stored}
        about = {"sha256": digests, "cut": cut, "metadata": metadata}
        # One entry: safetensors writes several in any order
        _write(path, first, {PIECES: json.dumps(about)} if further else dict(metadata))
    finally:  # of the old file or the new one, whichever is there by now
        keep_pieces(path, _present(path))


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, about)
            temporary.chmod(mode)  # safetensors leaves files that the owner alone can read
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be written ({_first_line(error)})") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's tensors and metadata, or raise CheckpointError. Tensors are memory-mapped, but
    for those that were cut."""
    if kind_of_file(path) != "safetensors":
        raise CheckpointError(f"{path}: a file of torch (.pth), no safetensors file")
    with _opened(path) as file:
        tensors, about = _tensors(file), _about(path, file)
    for piece in _checked(path, about):
        with _opened(piece) as file:
            tensors |= _tensors(file)
    for name, shape in about.cut.items():
        parts = list(_taken(tensors, name))
        try:
            tensors[name] = torch.cat(parts).view(shape)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {name} does not fit its shape {shape}") from error
    return tensors, about.metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Read what `write_tensors` was told beside the tensors, or raise CheckpointError, also for a
    piece that is missing or another one."""
    with _opened(path) as file:
        about = _about(path, file)
    list(_checked(path, about))
    return about.metadata


class _About(NamedTuple):
    """What a file says of itself."""

    metadata: dict[str, str]
    digests: Sequence[str] = ()
    """SHA-256 of each piece."""
    cut: Mapping[str, Any] = MappingProxyType({})
    """Shapes of tensors that were cut."""


def _about(path: Path, file: Any) -> _About:
    """Read what an open file says of itself; CheckpointError for nonsense."""
    metadata: dict[str, str] = file.metadata() or {}
    if PIECES not in metadata:
        return _About(metadata)
    try:
        whole = json.loads(metadata[PIECES])
        inner = {str(name): str(value) for name, value in whole["metadata"].items()}
        digests = [str(digest) for digest in whole["sha256"]]
        if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
            raise ValueError("no SHA-256")
        return _About(inner, digests, dict(whole["cut"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: does not tell which pieces belong to it") from error


def _checked(path: Path, about: _About) -> Iterator[Path]:
    """List a file's pieces; CheckpointError for one that is missing or another one."""
    for digest in about.digests:
        piece = _piece(path, digest)
        try:
            found = sha256_of(piece)
        except OSError as error:
            raise CheckpointError(f"{piece}: cannot be read ({error.strerror})") from error
        if found != digest:
            raise CheckpointError(f"{piece}: is not the piece that belongs to {path.name}")
        yield piece


def _present(path: Path) -> list[str]:
    """Return the names of the pieces that belong to the file that is there."""
    try:
        with _opened(path) as file:
            return [_piece(path, digest).name for digest in _about(path, file).digests]
    except CheckpointError:
        return []


def remove_tensors(path: Path) -> None:
    """Remove a file, if it is there, with its pieces."""
    path.unlink(missing_ok=True)
    keep_pieces(path, ())


def keep_pieces(path: Path, names: Collection[str]) -> None:
    """Remove a file's pieces that do not have one of these names: an older file's."""
    for found in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 16}"):
        if found.name not in names:
            found.unlink(missing_ok=True)


def _piece(path: Path, digest: str) -> Path:
    """Name the piece of a file that has this SHA-256."""
    return path.with_name(f"{path.name}.{digest[:16]}")


def _packs(
    tensors: Mapping[str, Tensor], metadata: Metadata, max_mb: int | None
) -> Sequence[dict[str, Tensor]]:
    """Share tensors out among files of at most so many megabytes, in their order."""
    size = sum(_bytes(name, tensor) for name, tensor in tensors.items())
    told = len(json.dumps(json.dumps(json.dumps(dict(metadata)))))  # as deep as it lies in the file
    if max_mb is None or size + told <= max_mb * MB:
        return [dict(tensors)]
    limit = max_mb * MB - 2 * ENTRY
    packs: list[dict[str, Tensor]] = [{}]
    shapes = sum(len(n) + ENTRY for n, tensor in tensors.items() if _bytes(n, tensor) > limit)
    room = limit - told - shapes - ENTRY * (2 * size // limit + 1)
    for name, tensor in tensors.items():
        parts = {name: tensor}
        if _bytes(name, tensor) > limit:
            cut = tensor.flatten().split((limit - len(name) - ENTRY) // tensor.itemsize)
            parts = {_part(name, number): part for number, part in enumerate(cut)}
        for each, part in parts.items():
            if _bytes(each, part) > room:
                packs.append({})
                room = limit
            packs[-1][each] = part
            room -= _bytes(each, part)
    return packs


def _bytes(name: str, tensor: Tensor) -> int:
    """Say at most how many bytes of a file a tensor takes."""
    return tensor.nbytes + len(name) + ENTRY


def _part(name: str, number: int) -> str:
    return f"{name}#{number}"


def _taken(tensors: dict[str, Tensor], name: str) -> Iterator[Tensor]:
    """Take the parts of a tensor that was cut, in their order."""
    number = 0
    while _part(name, number) in tensors:
        yield tensors.pop(_part(name, number))
        number += 1


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: missing, cut short or no safetensors file ({_first_line(error)})"
        ) from error


def _tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
