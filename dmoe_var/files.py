"""Write files whole or not at all, keep a folder to one process at a time, and hash files'
content."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from dmoe_var.errors import InputError

CHUNK = 2**24  # bytes that are read at once
ABANDONED = 3600
"""Seconds without a write after which another machine's temporary file counts as abandoned."""
LOCK_FILE = ".lock"
NOT_OFFERED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of a file system that has no locks, or cannot write through to its disk."""
HASHING_THREADS = 8
HASHED_AT_ONCE = 64
"""Files that a thread hashes per task: a data set has a million."""
BAR_DELAY = 2
"""Seconds before a bar is shown; it is often not needed, because most hashes are kept."""
SAVED_EVERY = 60
"""Seconds between writes of the ledger, which is large for large sets."""
LEDGER_FORMAT = "dmoe-var-hashes/1"
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that are the machine's fault, not the file's."""
SETTLED_NS = 2_000_000_000
"""Age from which a file's next change must show in its times: file systems tick coarsely."""

Stamp: TypeAlias = tuple[int, int, int, int]
"""A file's size, times of change of content and of inode, and inode number."""

_writers = itertools.count()
_held: set[tuple[int, int, Path]] = set()
"""Process, thread and folder of each lock that is held; a fork copies the set."""


@cache
def note(text: str) -> None:
    """Write a line to stderr, once in the life of the process."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write under; `path` exists once the block ends without an error.

    On an error (a full disk, an interrupt) the temporary file is removed. Its content is on the
    disk before it gets its name; otherwise a crash of the machine could leave an empty file.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        _write_through(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """Name a temporary file or folder for this writer alone; remove those of killed processes."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _abandoned(leftover):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    owner = f"{platform.node()}-{os.getpid()}.{next(_writers)}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def _write_through(path: Path) -> None:
    """Wait until a file's content is on the disk, if the file system offers that."""
    with path.open("rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise


def _abandoned(temporary: Path) -> bool:
    """Say whether a temporary file or folder is of a killed process (elsewhere: by its age)."""
    owner = re.search(rf"\.{re.escape(platform.node())}-(\d+)\.\d+\.tmp$", temporary.name)
    try:
        if owner:
            os.kill(int(owner[1]), 0)
        return time.time() - temporary.stat().st_mtime > ABANDONED
    except (ProcessLookupError, OverflowError):
        return True
    except (PermissionError, FileNotFoundError):  # of another user, or just removed by another
        return False


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder, so that no other process or thread works in it. If another one does, wait for
    it and say so on stderr. A process that dies releases its lock.

    The thread that holds a folder may ask for it again. Nothing is locked if the folder cannot be
    written to, since then nobody works in it. Nor is it if the file system has no locks; a line
    says so, because refusing would keep the whole project from such file systems.
    """
    holder = os.getpid(), threading.get_ident(), folder.resolve()
    if holder in _held or not os.access(folder, os.W_OK):
        yield
        return
    path = folder / LOCK_FILE
    descriptor = _lock(path)
    _held.add(holder)
    try:
        yield
    finally:
        _held.discard(holder)
        if _is_open_as(descriptor, path):  # else others removed the folder and made it again
            path.unlink(missing_ok=True)  # whoever waits for it finds it gone and makes a new one
        with suppress(OSError):  # if there are no locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for children that inherited it
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Return the descriptor of a lock file that exists and is held."""
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            waited |= _wait_for(descriptor, path, silently=waited)
            if _is_open_as(descriptor, path):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path, silently: bool) -> bool:
    """Lock an open file, and return whether another run held it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "which has just begun"
        if not silently:
            tqdm.write(f"waiting for another run ({owner}), at {path.parent}", file=sys.stderr)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise OSError(error.errno, error.strerror, str(path)) from error
        note(
            f"{path.parent}: its file system has no locks ({error.strerror}), so nothing keeps two "
            "runs from working in one folder: do not start the same one twice at once"
        )
    return False


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Say whether a path still names the file that is open."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, failure: type[InputError]) -> Any:
    """Read a JSON file; if it is missing, unreadable or cut short, `failure` names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a BOM
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise failure(f"{path}: cut short or no JSON file ({error})") from error


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file's content, in hex; once, if the file does not change."""
    return _sha256_kept(path.resolve(), _stamp(path))


def sha256_of_all(
    folder: Path, names: Sequence[str], hashes: Path | None, *, progress: bool = False
) -> list[str]:
    """Compute the SHA-256 of each named file in a folder; "" for one that cannot be read.

    hashes: a folder that keeps the hashes, so that a later call reads only what has changed. Size
    and time of writing alone do not prove that a file is the same: a time of writing can be set
    back, but the inode's time of change cannot. An interrupted call keeps what it has hashed.
    """
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    ledger = hashes / f"{place}.json" if hashes is not None else None
    kept = _read_ledger(ledger) if ledger is not None else {}
    parts = [names[i : i + HASHED_AT_ONCE] for i in range(0, len(names), HASHED_AT_ONCE)]
    digests: list[str] = []
    fresh: dict[str, str] = {}
    saved = time.monotonic()
    bar = tqdm(total=len(names), desc="hash", unit="file", disable=not progress, delay=BAR_DELAY)
    with bar, ThreadPoolExecutor(HASHING_THREADS) as pool:
        try:
            found = pool.map(lambda part: [_hashed(folder, name, kept) for name in part], parts)
            for part, entries in zip(parts, found, strict=True):
                bar.update(len(part))
                digests += [entry.rpartition(" ")[2] for entry in entries]
                new = zip(part, entries, strict=True)
                fresh |= {name: entry for name, entry in new if kept.get(name, "") != entry}
                if ledger is not None and time.monotonic() - saved > SAVED_EVERY:
                    _write_ledger(ledger, kept | fresh)
                    saved = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
            if ledger is not None and fresh:
                _write_ledger(ledger, kept | fresh)
    return digests


def _hashed(folder: Path, name: str, kept: Mapping[str, str]) -> str:
    """Return a file's ledger entry, its stamp and hash; "" if the file cannot be read."""
    try:
        stamp = " ".join(map(str, _stamp(folder / name)))  # taken before the file is read
        entry = kept.get(name, "")
        return entry if entry.startswith(f"{stamp} ") else f"{stamp} {_sha256(folder / name)}"
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        return ""


def _stamp(path: Path) -> Stamp:
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def _read_ledger(ledger: Path) -> dict[str, str]:
    """Read the entries by name; none if the ledger is missing or broken: all are hashed again."""
    try:
        content = json.loads(ledger.read_text(encoding="utf-8"))
        if content["format"] == LEDGER_FORMAT:
            return {str(name): str(entry) for name, entry in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return {}


def _write_ledger(ledger: Path, entries: Mapping[str, str]) -> None:
    """Write the entries, without files changed just now, which may change again without a trace.

    If the ledger's folder may not be written to (another user's), nothing is written.
    """
    latest = time.time_ns() - SETTLED_NS

    def settled(entry: str) -> bool:
        _, written, changed, _, _ = entry.split()
        return max(int(written), int(changed)) < latest

    kept = {name: entry for name, entry in entries.items() if entry and settled(entry)}
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        write_text(ledger, json.dumps({"format": LEDGER_FORMAT, "files": kept}))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


@lru_cache(maxsize=1024)
def _sha256_kept(path: Path, stamp: Stamp) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
