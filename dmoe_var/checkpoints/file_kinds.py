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
PAGE = "a web page instead of weights; download the file itself (on the hub /resolve/, not /blob/)"
COMPRESSED = "compressed; unpack it first"
OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer instead of weights; `git lfs pull` gets them"),
    (b"GGUF", "a GGUF file, which holds other models than these"),
    (b"\x89HDF", "an HDF5 file (Keras), which holds other models than these"),
    (b"\x93NUMPY", "a numpy array, no weights"),
    (b"\x89PNG", "a picture, no weights"),
    (b"\xff\xd8\xff", "a picture, no weights"),
    (b"\x1f\x8b", COMPRESSED),
    (b"BZh", COMPRESSED),
    (b"\xfd7zXZ", COMPRESSED),
    (b"\x28\xb5\x2f\xfd", COMPRESSED),
    (b"7z\xbc\xaf", COMPRESSED),
    (b"Rar!", COMPRESSED),
)
"""First bytes of files that people take for weights, and what to say about each."""


def kind_of_file(path: Path) -> Literal["safetensors", "torch"]:
    """Tell what reads a file of weights. Raise CheckpointError for any other file; the error says
    what the file is instead, or why it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if _is_safetensors(head):
            return "safetensors"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if head.startswith(b"PK"):
        _check_archive(path)
        return "torch"
    if head.startswith(b"\x80"):  # before torch 1.6
        return "torch"
    raise CheckpointError(f"{path}: {_said_of(head)}")


def _is_safetensors(head: bytes) -> bool:
    """Tell whether a file begins with the size of its header, in eight bytes, and a brace."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= LARGEST_HEADER


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for a zip archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # a broken archive makes the reader raise nearly anything
        raise CheckpointError(f"{path}: cut short, or a broken archive ({error})") from error
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        raise CheckpointError(f"{path}: a TorchScript program; weights are model.state_dict()")
    if "data.pkl" in last:
        return
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(f"{path}: numpy arrays (.npz), no weights")
    shown = ", ".join(names[:3]) or "nothing"
    raise CheckpointError(
        f"{path}: a zip archive of {shown}; unpack it and give the file or folder in it"
    )


def _said_of(head: bytes) -> str:
    """Say what a file without weights is."""
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "cut short (empty): it was not copied or downloaded to the end"
    for beginning, said in OTHERS:
        if head.startswith(beginning):
            return said
    if text.startswith(b"<"):
        return PAGE
    if text.startswith((b"{", b"[")):
        return "a JSON text, no weights; give the .safetensors or .pth file, or its folder"
    if head[:1] == b"\x08" and (b"onnx" in text or b"torch" in text or head[2:3] == b"\x12"):
        return "an ONNX file, a program; weights are model.state_dict()"
    if not any(head):
        return "cut short (begins with zeros): it was not copied or downloaded to the end"
    return f"cut short, or no state dict of safetensors or torch (begins with {head[:16]!r})"
