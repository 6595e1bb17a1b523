"""Notes to the user: what goes on all the same, but should be known."""

from __future__ import annotations

import os
import sys
from functools import cache

from tqdm import tqdm


@cache
def note(text: str) -> None:
    """Print one line to stderr, beside whatever bars are shown; a process says each line once, and
    of several processes the main one alone speaks."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(" ".join(text.splitlines()), file=sys.stderr)
