"""Compile C files for this machine at their first use, and keep the libraries.

The compiler is the one that `CC` names, or `cc`, `gcc` or `clang`. Libraries lie in
`DMOE_VAR_CACHE`, by default `~/.cache/dmoe_var`, under a hash of all that they depend on.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from dmoe_var.files import alone, note, whole_file, write_text

ARM = platform.machine().lower() in ("arm64", "aarch64")
FLAGS = ("-O3", "-mcpu=native" if ARM else "-march=native", "-fPIC")
LONGEST = 300
"""Seconds after which a command of the compiler is given up."""
OPENMP = re.compile(r"lib(gomp|iomp5|omp)[^/]*\.(so[.0-9]*|dylib)$")
Declared = TypeVar("Declared")


class CannotCompileError(Exception):
    """There is no library: the compiler is missing or fails, or a folder or file cannot be used."""


def cache_folder() -> Path:
    """Return the folder that keeps what is made for this machine. Raise FileNotFoundError if it is
    to lie in the home folder and there is none."""
    given = os.environ.get("DMOE_VAR_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dmoe_var"
    folder = Path(given) if given else base
    try:
        return folder.expanduser()
    except RuntimeError as error:
        why = "there is no home folder, DMOE_VAR_CACHE may name another"
        raise FileNotFoundError(errno.ENOENT, why, str(folder)) from error


@cache
def processor() -> str:
    """Describe the processor by its name and instructions, which compiled code depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    first = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    return "; ".join(f"{key} {first[key]}" for key in kept if key in first)


def load(source: Path) -> ctypes.CDLL:
    """Load the library of a C file, compiled if need be; CannotCompileError if that fails."""
    try:
        compiler = _compiler()
        version = _run([*compiler, "--version"])
        content = source.read_bytes()
        parts = [content.decode(), version, processor(), str(_openmp()), *compiler, *FLAGS]
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"{source.stem}-{name}.so"
        if not _is_whole(library):
            with alone(folder):
                if not _is_whole(library):  # another process made it while this one waited
                    _compile(compiler, source, library)
                    write_text(_digest_file(library), _digest(library))
        return ctypes.CDLL(str(library.resolve()))  # a bare name would be looked up elsewhere
    except (OSError, RuntimeError, ValueError) as error:  # disk, compiler or loader; quotes in CC
        raise CannotCompileError(" ".join(str(error).split())) from error


def _is_whole(library: Path) -> bool:
    """Say whether a library is as it was made: to load a damaged one can end the process."""
    try:
        return _digest_file(library).read_text("utf-8") == _digest(library)
    except (OSError, ValueError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _compiler() -> list[str]:
    given = os.environ.get("CC")
    for name in [given] if given else ["cc", "gcc", "clang"]:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise CannotCompileError(f"no C compiler: {given or 'cc, gcc, clang'} is not there")


@cache
def _openmp() -> Path | None:
    """Find torch's own OpenMP library: a second one's threads would compete for the cores."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8").split("\n")
        files = [Path(line[line.index("/") :]) for line in loaded if "/" in line]
    except OSError:  # not Linux
        files = sorted((Path(torch.__file__).parent / "lib").glob("lib*"))
    found = [path for path in files if OPENMP.search(path.name)]
    of_torch = [path for path in found if "torch" in path.parts]
    return next(iter(of_torch or found), None)


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    """Compile in two steps, so that OpenMP is used without linking the compiler's library of it."""
    openmp = _openmp()
    use = [] if openmp is None else ["-fopenmp"]
    if openmp is not None and platform.system() == "Darwin":
        use = ["-Xpreprocessor", "-fopenmp"]
    with tempfile.TemporaryDirectory() as folder, whole_file(library) as made:
        compiled = str(Path(folder) / "compiled.o")
        _run([*compiler, *FLAGS, *use, "-c", str(source), "-o", compiled])
        link = [] if openmp is None else [str(openmp)]
        _run([*compiler, "-shared", compiled, *link, "-o", str(made)])


def _run(command: list[str]) -> str:
    """Run a command and return what it prints; if it fails, RuntimeError with its first line."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LONGEST, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} took more than {LONGEST} seconds") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {said[0] if said else ''}")
    return done.stdout


@cache
def loaded(
    source: Path, declare: Callable[[ctypes.CDLL], Declared], purpose: str
) -> Declared | None:
    """Load the library of a C file and declare its functions; if that fails, return None and say
    why on stderr."""
    try:
        return declare(load(source))
    except (CannotCompileError, AttributeError) as error:  # or a function is not there
        note(f"{purpose}: {error}")
        return None
