"""Tell what a file is by its first bytes, never by its name, and what to do if it has no weights.

Weights are safetensors files and torch's own, as a zip archive or as written before torch 1.6.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from dmoe_var.errors import CheckpointError

HEAD = 512
"""Bytes read of a file. The farthest mark with a fixed place, a tar archive's, ends at byte 262."""
LARGEST_HEADER = 10**8
"""Most bytes of a safetensors file's header, by its specification."""
POINTER = b"version https://git-lfs"
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")
"""First bytes of files that gzip, bzip2, xz, zstd, 7z and rar leave."""


def kind_of_file(path: Path) -> Literal["safetensors", "torch"]:
    """Tell what reads a file of weights. Raise CheckpointError for any other file; the error says
    what the file is instead, or why it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    # The size of the header, in eight bytes, and the header's brace
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= LARGEST_HEADER:
        return "safetensors"
    if head.startswith(b"PK"):
        _check_archive(path)
        return "torch"
    if head.startswith(b"\x80"):  # before torch 1.6
        return "torch"
    raise CheckpointError(f"{path}: {_said_of(head)}")


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for a zip archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # a broken archive makes the reader raise nearly anything
        raise CheckpointError(f"{path}: cut short, or a broken archive ({error})") from error
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        shown = ", ".join(names[:3]) or "nothing"
        raise CheckpointError(
            f"{path}: a zip archive of {shown}; unpack it and give the file or folder in it"
        )


def _said_of(head: bytes) -> str:
    """Say what a file without weights is."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not any(head):
        return "cut short (empty, or begins with zeros): it was not copied or downloaded to the end"
    if head.startswith(POINTER):
        return "a git-lfs pointer instead of weights; `git lfs pull` gets them"
    if head.startswith(PACKED) or head[257:262] == b"ustar":
        return "packed or compressed; unpack it first"
    if text.startswith(b"<"):
        return "a web page; download the file itself (on the hub /resolve/, not /blob/)"
    if text.startswith((b"{", b"[")):
        return "a JSON text, no weights; give the .safetensors or .pth file, or its folder"
    return f"cut short, or no state dict of safetensors or torch (begins with {head[:16]!r})"
