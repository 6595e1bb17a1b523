"""Files that appear whole or not at all, and what identifies their content."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from dmoe_var.errors import InputError

CHUNK = 2**24
ABANDONED = 3600
"""Seconds without a write after which another machine's temporary file is nobody's any more."""


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
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise failure(f"{path}: cut short or no JSON file ({error})") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex; computed once for a file that has not changed."""
    about = path.stat()
    changes = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
    return _sha256(path.resolve(), changes)


@lru_cache(maxsize=64)
def _sha256(path: Path, changes: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
