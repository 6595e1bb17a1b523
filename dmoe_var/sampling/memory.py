"""Let the process keep memory that was freed."""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt
UP_TO, OF_OLD, KEPT = 1 << 30, 1 << 25, (1 << 31) - 1
"""Bytes: largest block that comes from kept memory, the same for older glibc versions (which take
no more), and how much memory is kept."""


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next feature map; return whether it could be told to.

    By default it hands blocks over 32 MiB back to the kernel at once, which then clears the pages
    of the next one. On a CPU that takes a twentieth of the time of a d16 image, so `generate` calls
    this there. It holds for the whole process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    if not mallopt(M_MMAP_THRESHOLD, UP_TO):
        mallopt(M_MMAP_THRESHOLD, OF_OLD)
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT))
