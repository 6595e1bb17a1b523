"""Open images and statistics that a user names, known by what is in a file, not by its name.

Legend: N images, H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmoe_var.arrays import map_npz, names_in, read_npz
from dmoe_var.data.image_sets import ImageFolder, KeyedArray, KeyedPixels
from dmoe_var.errors import DataError
from dmoe_var.files import sha256_of

IMAGES = "arr_0"
"""Name of the images in files of the ADM evaluator, and in ours."""
LABELS = ("labels", "arr_1")
"""Names of their classes: in ours, and in what ADM's sampler writes."""
STATISTICS = {"mu", "sigma"}

ALLOWED = (
    "a folder of pictures, or an .npz file of images (arr_0, uint8 (N, H, W, 3)) or of statistics "
    "(mu, sigma)"
)
START = 512
"""Bytes read of a file. The farthest mark with a fixed place, a tar archive's, ends at byte 262."""


@dataclass(frozen=True)
class NamedImages:
    """What `open_images` found.

    images: None if they are not there or not asked for. statistics: whether mu and sigma are there.
    """

    path: Path
    sha256: str
    images: KeyedPixels | None
    statistics: bool

    def check_unchanged(self, hashes: Path | None) -> None:
        """Raise DataError if the content is no longer what it was when it was opened."""
        if content_sha256(self.path, hashes) != self.sha256:
            raise DataError(f"{self.path}: changed while it was read; run again once it is whole")


def content_sha256(path: Path, hashes: Path | None) -> str:
    """Return the SHA-256 of a file, or of a folder's pictures and their places. Raise DataError if
    there is none. `hashes`: a folder in which those of a folder's files are kept."""
    if path.is_dir():
        return ImageFolder.open(path, 0, hashes).sha256
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def open_images(
    key: str, path: Path, image_size: int, hashes: Path | None, *, images_too: bool
) -> NamedImages:
    """Open the images, of image_size pixels per side, or statistics that a configuration key names.

    images_too: whether images that lie beside statistics are asked for.

    Raise DataError, which names the key or the file, if it is missing or something else.
    """
    if path.is_dir():
        folder = ImageFolder.open(path, image_size, hashes)
        return NamedImages(path, folder.sha256, folder, False)
    if not path.is_file():
        raise DataError(f"{key}={path}: no such .npz file or folder of images; allowed: {ALLOWED}")
    sha256 = content_sha256(path, hashes)
    found = _arrays_in(key, path)
    there = STATISTICS & {*found}
    statistics = there == STATISTICS
    if not statistics and (there or IMAGES not in found):
        held = ", ".join(found[:5]) or "no arrays"
        raise DataError(f"{key}={path}: holds {held}; allowed: {ALLOWED}")
    images = None
    if IMAGES in found and (images_too or not statistics):
        images = KeyedArray(_images_of(path, image_size), f"{sha256}-{IMAGES}")
    return NamedImages(path, sha256, images, statistics)


def labels_of(found: NamedImages) -> npt.NDArray[np.int64] | None:
    """Read the classes (N,) of images: those in the .npz file, or the names of the images' folders
    if all are whole numbers. Return None if nothing tells them."""
    if isinstance(found.images, ImageFolder):
        names = [path.parent.name for path in found.images.files]
        if not all(name.isascii() and name.isdecimal() for name in names):
            return None
        return np.array([int(name) for name in names], dtype=np.int64)
    name = next((name for name in LABELS if name in names_in(found.path)), None)
    if name is None or found.images is None:
        return None
    labels: npt.NDArray[np.int64] = read_npz(found.path, [name])[0]
    if labels.shape != (len(found.images),) or not np.issubdtype(labels.dtype, np.integer):
        got = f"{labels.dtype} {labels.shape}"
        raise DataError(f"{found.path}: {name} is {got}; expected a class for each image")
    return labels.astype(np.int64)


def _arrays_in(key: str, path: Path) -> list[str]:
    """List what is in an .npz file. Raise DataError, which says what it is, for another file."""
    with path.open("rb") as file:
        start = file.read(START)
    if start[:4] != b"PK\3\4":
        raise DataError(f"{key}={path}: {_what_it_is(start)}; allowed: {ALLOWED}")
    return names_in(path)


def _what_it_is(start: bytes) -> str:
    """Say what a file is that begins like this and is no .npz file."""
    known = (
        (not start, "an empty file"),
        (start.startswith(b"\x93NUMPY"), "a single array; np.savez(file, arr_0=array) writes .npz"),
        (start.startswith(b"version https://git-lfs"), "a pointer of git-lfs; run git lfs pull"),
        (start.lstrip()[:1] == b"<", "a web page in the file's place"),
        (start[:1] == b"\x80", "a pickle or a PyTorch file"),
        (start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar", "an archive; unpack it"),
    )
    return next((what for true, what in known if true), "no .npz file")


def _images_of(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """Map the images of an .npz file; raise DataError if they are not uint8 of this size."""
    images = map_npz(path, IMAGES)
    expected = (image_size, image_size, 3)
    if images.dtype == np.uint8 and images.shape[1:] == expected:
        return images
    raise DataError(
        f"{path}: {IMAGES} is {images.dtype} {images.shape}; expected uint8 {('N', *expected)}, of "
        f"data.image_size={image_size} pixels per side"
    )
