"""Fit torch's threads to the cores that a process may use and to other processes on the machine.

Importing this file does not import torch: OpenMP reads its settings once, when torch loads.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
"""How long an idle thread spins before it sleeps: turns for GNU's OpenMP, milliseconds for LLVM's
and Intel's. GNU's default is 300,000 turns, longer than the system lets a thread run beside another
busy process. Then each of an image's thousands of products waits for a thread that only spins.
Measured: a batch of eight digits on two cores of a Xeon, alone and beside such a process (medians
of eight calls, over several rounds). Default: 85 to 105 ms and up to 4,650 ms. 10,000 turns: 89 to
121 and 366 to 412 ms. 3,000 turns: 107 to 116 and 210 to 222 ms. 1,000 turns: 89 to 124 and 143 to
200 ms."""
SAID_BY_USER = ("OMP_WAIT_POLICY", *WAITING)
COUNTED_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def settle_threads() -> None:
    """Make torch's threads sleep soon, and run no more of them than there are usable cores, so that
    other processes can work beside them. OpenMP's environment variables take precedence. If torch
    is loaded already, nothing changes."""
    if "torch" in sys.modules:
        return
    if not any(os.environ.get(name) for name in SAID_BY_USER):
        os.environ.update(WAITING)
    limit_threads()


def limit_threads() -> None:
    """Let torch run no more threads than there are usable cores, unless the environment sets their
    number. torch itself knows of affinity, but not of quotas."""
    import torch

    cores = usable_cores()
    if cores < torch.get_num_threads() and not any(map(os.environ.get, COUNTED_BY_USER)):
        torch.set_num_threads(cores)


def usable_cores() -> int:
    """Count the cores that this process may use, at least 1: those of its affinity, or fewer if the
    quota of a control group (a container's or a job's) is lower. Quotas are rounded up."""
    counted = getattr(os, "process_cpu_count", None)  # from 3.13; it also heeds PYTHON_CPU_COUNT
    if counted is not None:
        cores = counted() or 1
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Yield the cores that each control group above this process allows, if it sets a limit."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":  # version 2, alone or beside version 1
            for folder in _upwards((CGROUPS, CGROUPS / "unified"), place):
                yield from _quota(_words(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            for folder in _upwards((CGROUPS / controllers, CGROUPS / "cpu"), place):
                files = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                yield from _quota([word for file in files for word in _words(file)])


def _upwards(roots: tuple[Path, ...], place: str) -> Iterator[Path]:
    """Yield the folders of a control group and of all above it. In a container its own group is the
    root, whatever the place is called."""
    for root in roots:
        inner = root.joinpath(*(part for part in place.split("/") if part != ".."))
        for folder in (inner, *inner.parents):
            yield folder
            if folder == root:
                break


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def _quota(words: list[str]) -> Iterator[float]:
    """Yield the cores of a quota: 1.5 for ["150000", "100000"]. "max" and -1 set no limit."""
    if len(words) == 2 and words[0].isdecimal() and int(words[1]) > 0:
        yield int(words[0]) / int(words[1])
