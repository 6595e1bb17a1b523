"""Files that appear whole or not at all, and what identifies their content."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from dmoe_var.errors import InputError

CHUNK = 2**24
ABANDONED = 3600
"""Seconds without a write after which another machine's temporary file is nobody's any more."""
HASHING_THREADS = 8
SETTLED_NS = 2_000_000_000
"""Age of a file from which another change must show in its times: file systems tick coarsely."""

Stamp: TypeAlias = tuple[int, int, int, int]
"""A file's size, times of change of content and of inode, and inode number."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write under; `path` exists once the block has ended without an error.

    The temporary file is removed on an error (a full disk, an interrupt).
    """
    prefix = f".{path.name}."
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        if _abandoned(leftover, leftover.name[len(prefix) :].removesuffix(".tmp")):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{prefix}{platform.node()}-{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _abandoned(temporary: Path, owner: str) -> bool:
    """Whether a temporary file is that of a killed process, here or (by its age) elsewhere."""
    node, _, pid = owner.rpartition("-")
    if node == platform.node() and pid.isdecimal():
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            return False
    try:
        return time.time() - temporary.stat().st_mtime > ABANDONED
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, failure: type[InputError]) -> Any:
    """Content of a JSON file; `failure` names a file that is missing, unreadable or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # some editors leave a mark
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise failure(f"{path}: cut short or no JSON file ({error})") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex; computed once for a file that has not changed."""
    return _sha256_kept(path.resolve(), _stamp(path))


def sha256_of_all(
    folder: Path, names: Sequence[str], ledger: Path, *, progress: bool = False
) -> list[str]:
    """SHA-256 of each of a folder's files, by name; "" for one that cannot be read.

    ledger: a file that keeps them, so that a later call reads only what has changed. Neither size
    nor time of writing alone proves that a file is the same: a time can be set back, but not the
    time at which the inode changed. An interrupted call keeps what it has hashed.
    """
    kept = _read_ledger(ledger)
    stamps = [_stamp_if_there(folder / name) for name in names]
    found: dict[str, tuple[Stamp, str]] = {}
    changed = []
    for name, stamp in zip(names, stamps, strict=True):
        if stamp is not None and name in kept and kept[name][0] == stamp:
            found[name] = kept[name]
        elif stamp is not None:
            changed.append(name)
    if not changed:
        return [found[name][1] if name in found else "" for name in names]
    bar = tqdm(total=len(changed), desc="hash", unit="file", disable=not progress)
    with bar, ThreadPoolExecutor(HASHING_THREADS) as pool:
        try:
            hashed = pool.map(lambda name: _hashed(folder / name), changed)
            for name, entry in zip(changed, hashed, strict=True):
                bar.update()
                if entry is not None:
                    found[name] = entry
        finally:
            pool.shutdown(cancel_futures=True)
            _write_ledger(ledger, {**kept, **found})
    return [found[name][1] if name in found else "" for name in names]


def _hashed(path: Path) -> tuple[Stamp, str] | None:
    """A file's stamp and hash; None for one that cannot be read."""
    try:
        before = _stamp(path)
        return before, _sha256(path)
    except OSError:
        return None


def _stamp(path: Path) -> Stamp:
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def _stamp_if_there(path: Path) -> Stamp | None:
    try:
        return _stamp(path)
    except OSError:
        return None


def _read_ledger(ledger: Path) -> dict[str, tuple[Stamp, str]]:
    """Stamps and hashes by name; nothing where the file is missing or broken: all are hashed."""
    try:
        content = json.loads(ledger.read_text(encoding="utf-8"))
        return {
            name: ((int(size), int(mtime), int(ctime), int(inode)), str(digest))
            for name, (size, mtime, ctime, inode, digest) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _write_ledger(ledger: Path, entries: dict[str, tuple[Stamp, str]]) -> None:
    """Leaves out what was changed just now, which may change again without a trace."""
    latest = time.time_ns() - SETTLED_NS
    content = {
        name: [*stamp, digest]
        for name, (stamp, digest) in entries.items()
        if max(stamp[1], stamp[2]) < latest
    }
    ledger.parent.mkdir(parents=True, exist_ok=True)
    write_text(ledger, json.dumps(content))


@lru_cache(maxsize=64)
def _sha256_kept(path: Path, stamp: Stamp) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
