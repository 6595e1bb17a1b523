"""Files that appear whole or not at all, folders in which one process works at a time, and what
identifies a file's content."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import platform
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

CHUNK = 2**24
ABANDONED = 3600
"""Seconds without a write after which another machine's temporary file is nobody's any more."""
LOCK_FILE = ".lock"
NOT_OFFERED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system says that has no locks, or cannot write through to its disk."""
HASHING_THREADS = 8
HASHED_AT_ONCE = 64
"""Files that a thread hashes before it is given more: a data set has a million."""
BAR_DELAY = 2
"""Seconds before a bar is shown: mostly all hashes are kept."""
SAVED_EVERY = 60
"""Seconds between two writings of the ledger, which is large for large sets."""
LEDGER_FORMAT = "dmoe-var-hashes/1"
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""The machine's fault, not the file's."""
SETTLED_NS = 2_000_000_000
"""Age of a file from which another change must show in its times: file systems tick coarsely."""

Stamp: TypeAlias = tuple[int, int, int, int]
"""A file's size, times of change of content and of inode, and inode number."""

_writers = itertools.count()
_held: set[tuple[int, int, Path]] = set()
"""Processes (a fork copies the set), threads and the folders that they hold."""


@cache
def note(text: str) -> None:
    """Say something on stderr, once in the life of the process."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write under; `path` exists once the block has ended without an error.

    The temporary file is removed on an error (a full disk, an interrupt). Its content is on the
    disk before it gets the name: otherwise a machine that crashes could leave an empty file.
    """
    prefix = f".{path.name}."
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        if _abandoned(leftover, leftover.name[len(prefix) :].removesuffix(".tmp")):
            leftover.unlink(missing_ok=True)
    owner = f"{platform.node()}-{os.getpid()}.{next(_writers)}"
    temporary = path.with_name(f"{prefix}{owner}.tmp")
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


def _write_through(path: Path) -> None:
    """Wait until a file's content is on the disk, where the file system offers that."""
    with path.open("rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise


def _abandoned(temporary: Path, owner: str) -> bool:
    """Whether a temporary file is that of a killed process, here or (by its age) elsewhere."""
    node, _, number = owner.rpartition("-")
    pid = number.partition(".")[0]
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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process, and no other thread, works in a folder meanwhile; one that does is waited
    for, which a line on stderr says. A process that dies lets go of it.

    The thread that holds a folder may ask for it again. A folder that cannot be written to is not
    worked in by anyone, and nothing is locked. Neither is it where the file system has no locks: a
    line says so, for to refuse would keep the whole project from such file systems.
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
        if _is_open_as(descriptor, path):  # else the folder was removed, and made again by others
            path.unlink(missing_ok=True)  # who waits for it finds it gone, and takes a new one
        with suppress(OSError):  # where there are none
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for children that inherited it
        os.close(descriptor)


def _lock(path: Path) -> int:
    """The descriptor of a lock file that is there and held."""
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
    """Locks an open file; whether another one had it."""
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
    """Whether a path still names the file that is open."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
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
    folder: Path, names: Sequence[str], ledger: Path | None, *, progress: bool = False
) -> list[str]:
    """SHA-256 of each of a folder's files, by name; "" for one that cannot be read.

    ledger: a file that keeps them, so that a later call reads only what has changed. Neither size
    nor time of writing alone proves that a file is the same: a time can be set back, but not the
    time at which the inode changed. An interrupted call keeps what it has hashed.
    """
    kept = _read_ledger(ledger) if ledger is not None else {}
    parts = [names[i : i + HASHED_AT_ONCE] for i in range(0, len(names), HASHED_AT_ONCE)]
    hashes: list[str] = []
    fresh: dict[str, str] = {}
    saved = time.monotonic()
    bar = tqdm(total=len(names), desc="hash", unit="file", disable=not progress, delay=BAR_DELAY)
    with bar, ThreadPoolExecutor(HASHING_THREADS) as pool:
        try:
            found = pool.map(lambda part: [_hashed(folder, name, kept) for name in part], parts)
            for part, entries in zip(parts, found, strict=True):
                bar.update(len(part))
                hashes += [entry.rpartition(" ")[2] for entry in entries]
                new = zip(part, entries, strict=True)
                fresh |= {name: entry for name, entry in new if kept.get(name, "") != entry}
                if ledger is not None and time.monotonic() - saved > SAVED_EVERY:
                    _write_ledger(ledger, kept | fresh)
                    saved = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
            if ledger is not None and fresh:
                _write_ledger(ledger, kept | fresh)
    return hashes


def _hashed(folder: Path, name: str, kept: Mapping[str, str]) -> str:
    """A file's entry of the ledger: its stamp and hash, "" for a file that cannot be read."""
    try:
        stamp = " ".join(map(str, _stamp(folder / name)))  # before it is read
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
    """Entries by name; nothing where the file is missing or broken: all are hashed again."""
    try:
        content = json.loads(ledger.read_text(encoding="utf-8"))
        if content["format"] == LEDGER_FORMAT:
            return {str(name): str(entry) for name, entry in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return {}


def _write_ledger(ledger: Path, entries: Mapping[str, str]) -> None:
    """Leaves out what was changed just now, which may change again without a trace.

    A ledger in a folder of another user's is only read.
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


@lru_cache(maxsize=64)
def _sha256_kept(path: Path, stamp: Stamp) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
