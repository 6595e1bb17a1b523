"""How the process treats memory that was freed."""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
UP_TO, OF_OLD, KEPT = 1 << 30, 1 << 25, (1 << 31) - 1
"""Bytes: blocks up to here come from memory that is kept (older versions take no more than the
second), and that much is kept."""


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next feature map; whether it could be told to.

    By default it hands blocks over 32 MiB back to the kernel at once, which then clears the pages
    of the next one: a twentieth of the time of a d16 image on a CPU. `generate` asks for it there;
    it holds for the whole process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    if not mallopt(M_MMAP_THRESHOLD, UP_TO):
        mallopt(M_MMAP_THRESHOLD, OF_OLD)
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT))
