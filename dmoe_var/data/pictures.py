"""Open picture files; nothing else opens them.

A picture is what Pillow's `convert("RGB")` gives, as for torchvision's ImageFolder and the
published code: alpha is dropped and an EXIF orientation is not applied, so that pictures are those
that published models have seen. If that call would clip values to white or black, they are brought
to 8 bits first, or the picture is unreadable.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Image as Picture

from dmoe_var.errors import DataError
from dmoe_var.files import OUT_OF_RESOURCES

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What a picture's name ends with, in any case: torchvision's list."""

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of more than 8 bits, all of them grey."""
SCALED_FORMATS = ("PNG", "PPM")
"""Formats for which mode I always holds 0..65535."""
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
"""Tags of TIFF: bits in use, and whether 0 is white (0) or black (1)."""


class UnreadablePictureError(DataError):
    """A picture cannot be read. `path` and `reason` are each in one line of printable text."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = printable(path), reason
        super().__init__(f"{self.path}: unreadable picture ({reason})")


def open_rgb(path: Path) -> Picture:
    """Open the picture of a file as RGB, 8 bits per channel.

    Raise UnreadablePictureError for a file that is missing, broken, no picture, or of values
    whose range is unknown, and MemoryError or OSError if the machine is at its limit.
    """
    try:
        if not path.is_file() and path.exists():
            raise UnreadablePictureError(path, "no regular file")
        with Image.open(path) as picture:
            picture.info.pop("transparency", None)  # of a colour, which `convert` would look up
            eight_bits = _eight_bits(path, picture) if picture.mode in DEEP_MODES else picture
            return eight_bits.convert("RGB")
    except (UnreadablePictureError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePictureError(path, _what_it_is(path)) from error
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        raise UnreadablePictureError(
            path, error.strerror or " ".join(str(error).split())
        ) from error
    except Exception as error:  # a broken file makes decoders raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnreadablePictureError(path, reason) from error


def _eight_bits(path: Path, picture: Picture) -> Picture:
    """Scale a grey picture of more than 8 bits to 0..255, rounded."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in SCALED_FORMATS):
        kind = "floating-point" if picture.mode == "F" else "32-bit or signed"
        raise UnreadablePictureError(path, f"{kind} values: which of them is white is unknown")
    tags = getattr(picture, "tag_v2", {})
    white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    deep_HW = np.asarray(picture).astype(np.int64)
    grey_HW = (deep_HW * 255 + white // 2) // white
    if tags.get(PHOTOMETRIC) == 0:
        grey_HW = 255 - grey_HW
    return Image.fromarray(grey_HW.astype(np.uint8))


def _what_it_is(path: Path) -> str:
    """Say what a file is in which no decoder sees a picture."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs in the picture's place; git lfs pull fetches it"
    return "of no format that Pillow knows"


def printable(path: Path) -> str:
    """Write a path in one line of UTF-8, whatever its bytes are."""
    return str(path).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
