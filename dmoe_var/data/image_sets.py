"""Read sets of images piece by piece: arrays in memory or on the disk, and folders.

Legend: B batch, N images, H W height and width, R image side.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmoe_var.data.class_folders import visible_files
from dmoe_var.data.images import check_images
from dmoe_var.data.pictures import EXTENSIONS, UnreadablePictureError, open_rgb
from dmoe_var.errors import DataError, InputError
from dmoe_var.files import note, sha256_of_all


@runtime_checkable
class Pixels(Protocol):
    """A set of images of one size; the data sets are such sets too."""

    def __len__(self) -> int: ...

    def pixels(self, indices: Tensor) -> npt.NDArray[np.uint8]:
        """Return images, uint8 (B, H, W, 3), by their indices, int64 (B,)."""
        ...


class KeyedPixels(Pixels, Protocol):
    """A set of images, and a name for its content."""

    @property
    def key(self) -> str: ...


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Images uint8 (N, H, W, 3) in memory, or on the disk as a memory map."""

    images: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, indices: Tensor) -> npt.NDArray[np.uint8]:
        return np.asarray(self.images[indices.numpy()])


@dataclass(frozen=True, eq=False)
class KeyedArray(ImageArray):
    """Images uint8 (N, H, W, 3), and a name for their content."""

    key: str


@dataclass(frozen=True)
class ImageFolder:
    """The image files under a folder, in sorted order, each of image_size pixels per side.

    They are read as they are: nothing is resized or cropped. `hashes`: a folder that keeps hashes
    of the files' content (None keeps none).
    """

    folder: Path
    image_size: int
    files: tuple[Path, ...]
    hashes: Path | None = None

    @classmethod
    def open(cls, folder: Path, image_size: int, hashes: Path | None = None) -> ImageFolder:
        """List the files, in subfolders and behind links too, but not what is hidden; a folder that
        is reached twice counts once. Other files than images are passed over, with a note. Raise
        DataError if there are no images."""
        try:
            found = sorted(filter(Path.is_file, map(Path, visible_files(folder, Counter()))))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        places = sorted({path.parent for path in found}, reverse=True)
        once = {*{os.path.realpath(place): place for place in places}.values()}
        found = [path for path in found if path.parent in once]
        files = tuple(path for path in found if path.name.lower().endswith(EXTENSIONS))
        others = [path.name for path in found if not path.name.lower().endswith(EXTENSIONS)]
        if not files:
            inside = f"; it holds {', '.join(others[:3])}" if others else ""
            raise DataError(f"{folder}: no image files ({', '.join(EXTENSIONS)}) in it{inside}")
        if others:
            names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            note(f"{folder}: {len(files)} image files, passed over {len(others)} others ({names})")
        return cls(folder, image_size, files, hashes)

    @cached_property
    def sha256(self) -> str:
        """Hash of the files' places and content, taken when first asked for. Raises DataError for a
        file that is unreadable."""
        places = [path.relative_to(self.folder).as_posix() for path in self.files]
        found = sha256_of_all(self.folder, places, self.hashes)
        for place, digest in zip(places, found, strict=True):
            if not digest:
                raise DataError(f"{self.folder / place}: no readable image")
        return hashlib.sha256(json.dumps([*zip(places, found, strict=True)]).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Name of the content and of the size at which it is read."""
        return f"folder-{self.image_size}-{self.sha256[:16]}"

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, indices: Tensor) -> npt.NDArray[np.uint8]:
        """Read images, uint8 (B, R, R, 3). Raise DataError for an unreadable file or other size."""
        return np.stack([self._read(self.files[index]) for index in indices.tolist()])

    def _read(self, path: Path) -> npt.NDArray[np.uint8]:
        try:
            pixels = np.asarray(open_rgb(path))
        except UnreadablePictureError as error:
            raise DataError(f"{error.path}: no readable image ({error.reason})") from error
        if pixels.shape[:2] != (self.image_size, self.image_size):
            size = f"{self.image_size} x {self.image_size}"
            found = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise DataError(f"{path}: {found} pixels; expected {size}")
        return pixels


def as_pixels(images: Pixels | npt.NDArray[np.uint8], at_least: int = 1) -> Pixels:
    """Turn images into a set; raise InputError for anything else or fewer than `at_least`."""
    if not isinstance(images, Pixels):
        check_images(images, at_least)
        return ImageArray(images)
    if len(images) < at_least:
        raise InputError(f"at least {at_least} images are needed; got {len(images)}")
    return images


def evenly_strided(num_images: int, most: int) -> Tensor:
    """Choose at most `most` of num_images images, spread evenly, by their indices, int64."""
    count = min(num_images, most)
    return torch.arange(count) * num_images // max(count, 1)


def all_pixels(images: Pixels) -> npt.NDArray[Any]:
    """Read every image of a set that fits into memory."""
    return images.pixels(torch.arange(len(images)))
