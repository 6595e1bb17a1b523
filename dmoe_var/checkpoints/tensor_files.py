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
from typing import Any

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
HEADER = MB // 4
"""Bytes of a file that are left to its names and metadata."""
Metadata = Mapping[str, str]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Metadata, max_mb: int | None = None
) -> None:
    """Write named tensors. Raise CheckpointError if the disk refuses.

    max_mb: most megabytes per file; None does not limit it. A tensor that is larger is cut.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    first, *further = [contiguous] if max_mb is None else _packs(contiguous, max_mb * MB - HEADER)
    hashes: dict[str, str] = {}
    about = dict(metadata)
    if further:
        for pack in further:
            content = save(pack)
            digest = hashlib.sha256(content).hexdigest()
            hashes[_piece(path, digest)] = digest
            with whole_file(path.with_name(_piece(path, digest))) as temporary:
                temporary.write_bytes(content)
        stored = {name for pack in (first, *further) for name in pack}
        cut = {name: list(t.shape) for name, t in contiguous.items() if name not in stored}
        whole = {"sha256": list(hashes.values()), "cut": cut, "metadata": about}
        about = {PIECES: json.dumps(whole)}  # one entry: safetensors writes several in any order
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(first, temporary, about)
            temporary.chmod(mode)  # safetensors leaves files that the owner alone can read
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be written ({_first_line(error)})") from error
    keep_pieces(path, hashes)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's tensors (memory-mapped) and metadata, or raise CheckpointError."""
    if kind_of_file(path) != "safetensors":
        raise CheckpointError(f"{path}: a file of torch (.pth), no safetensors file")
    with _opened(path) as file:
        tensors, about = _tensors(file), file.metadata() or {}
    if PIECES not in about:
        return tensors, about
    try:
        whole = json.loads(about[PIECES])
        metadata = {str(name): str(value) for name, value in whole["metadata"].items()}
        digests = [re.fullmatch("[0-9a-f]{64}", digest)[0] for digest in whole["sha256"]]  # type: ignore[index]
        cut = dict(whole["cut"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: does not tell which pieces belong to it") from error
    for digest in digests:
        piece = path.with_name(_piece(path, digest))
        with _opened(piece) as file:
            tensors |= _tensors(file)
        if sha256_of(piece) != digest:
            raise CheckpointError(f"{piece}: is not the piece that belongs to {path.name}")
    for name, shape in cut.items():
        parts = list(_taken(tensors, name))
        try:
            tensors[name] = torch.cat(parts).view(shape)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {name} does not fit its shape {shape}") from error
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Read what `write_tensors` was told beside the tensors, without them; or CheckpointError."""
    with _opened(path) as file:
        about: dict[str, str] = file.metadata() or {}
    if PIECES in about:
        return read_tensors(path)[1]
    return about


def remove_tensors(path: Path) -> None:
    """Remove a file, if it is there, with its pieces."""
    path.unlink(missing_ok=True)
    keep_pieces(path, ())


def keep_pieces(path: Path, names: Collection[str]) -> None:
    """Remove a file's pieces that do not have one of these names: an older file's."""
    for found in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 16}"):
        if found.name not in names:
            found.unlink(missing_ok=True)


def _piece(path: Path, digest: str) -> str:
    """Name the piece of a file that has this SHA-256."""
    return f"{path.name}.{digest[:16]}"


def _packs(tensors: Mapping[str, Tensor], limit: int) -> Sequence[dict[str, Tensor]]:
    """Share tensors out among files of at most `limit` bytes, in their order."""
    packs: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        parts = {name: tensor}
        if tensor.nbytes > limit:
            cut = tensor.flatten().split(limit // tensor.itemsize)
            parts = {_part(name, number): part for number, part in enumerate(cut)}
        for each, part in parts.items():
            if part.nbytes > room:
                packs.append({})
                room = limit
            packs[-1][each] = part
            room -= part.nbytes
    return packs


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
