"""Write arrays to .npz files piece by piece, whole or not at all, and read them without loading.

50,000 images of 256 px are 10 GB; neither writing nor reading them may take that much memory.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmoe_var.errors import DataError
from dmoe_var.files import whole_file

Array = npt.NDArray[Any]

LOCAL_HEADER = 30
"""Bytes before a zip member's name, which ends with the lengths of the name and the extra field."""


@dataclass(frozen=True)
class StoredRows:
    """Describes an array that arrives in pieces: arrays of `dtype` that have this shape if they are
    joined along the first axis."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    pieces: Iterable[Array]


def write_npz(path: Path, arrays: Mapping[str, Array | StoredRows]) -> None:
    """Write an uncompressed .npz file, whole or not at all; equal arrays give equal bytes.

    Raises ValueError if the pieces of `StoredRows` are not of its dtype or shape.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed: 1980
            with archive.open(info, "w", force_zip64=True) as member:
                if isinstance(array, StoredRows):
                    _write_rows(member, name, array)
                else:
                    np.lib.format.write_array(member, array, allow_pickle=False)


def _write_rows(member: Any, name: str, rows: StoredRows) -> None:
    dtype, written = np.dtype(rows.dtype), 0
    header = {"descr": dtype.str, "fortran_order": False, "shape": rows.shape}
    np.lib.format.write_array_header_1_0(member, header)
    for piece in rows.pieces:
        if piece.dtype != dtype or piece.shape[1:] != rows.shape[1:]:
            got = f"{piece.dtype} {piece.shape}"
            raise ValueError(f"{name}: a piece is {got}, the array is {dtype} {rows.shape}")
        member.write(np.ascontiguousarray(piece).data)
        written += len(piece)
    if written != rows.shape[0]:
        raise ValueError(f"{name}: the pieces have {written} rows, the array is {rows.shape}")


def read_npz(path: Path, names: Iterable[str]) -> list[Array]:
    """Load arrays of an .npz file by name into memory, and compare their checksums.

    Raises DataError, naming the file, if it is missing or broken, or lacks one of them.
    """
    with _reading(path), np.load(path, allow_pickle=False) as file:
        return [file[name] for name in names]


def map_npz(path: Path, name: str) -> Array:
    """Map one array of an .npz file, read from the disk as it is used; a compressed one is loaded.

    Raises DataError, naming the file, if it is missing or broken, or lacks the array.
    """
    with _reading(path):
        layout = _layout(path, name)
        if layout is not None and 0 not in layout[0]:
            shape, fortran, dtype, start = layout
            return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
    return read_npz(path, [name])[0]


def _layout(path: Path, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int] | None:
    """Find the shape, order, dtype and first byte of an array; None if it cannot be mapped."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            if info.compress_type != zipfile.ZIP_STORED or version != (1, 0):
                return None
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            header = member.tell()
    if dtype.hasobject:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset)
        lengths = struct.unpack("<HH", file.read(LOCAL_HEADER)[-4:])
    return shape, fortran, dtype, info.header_offset + LOCAL_HEADER + sum(lengths) + header


def names_in(path: Path) -> list[str]:
    """List the names of the arrays in an .npz file; DataError if it is missing or broken."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def is_intact(path: Path) -> bool:
    """Say whether every array of an .npz file is there and matches its checksum."""
    try:
        with _reading(path), zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except DataError:
        return False


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a broken archive makes the readers raise nearly anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{path}: missing or no readable .npz file ({reason})") from error
