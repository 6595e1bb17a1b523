"""Sets of images that are read piece by piece: arrays in memory or on the disk, and folders.

Legend: B batch, N images, H W height and width, R image side.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dmoe_var.errors import DataError, InputError
from dmoe_var.metrics.images import check_images

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@runtime_checkable
class Pixels(Protocol):
    """A set of images of one size; the data sets are such sets too."""

    def __len__(self) -> int: ...

    def pixels(self, indices: Tensor) -> npt.NDArray[np.uint8]:
        """Images uint8 (B, H, W, 3) by their indices, int64 (B,)."""
        ...


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Images uint8 (N, H, W, 3) in memory, or on the disk as a memory map."""

    images: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, indices: Tensor) -> npt.NDArray[np.uint8]:
        return np.asarray(self.images[indices.numpy()])


@dataclass(frozen=True)
class ImageFolder:
    """The image files under a folder, in sorted order, each of image_size pixels a side.

    They are read as they are: nothing is resized or cropped.
    """

    folder: Path
    image_size: int
    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, image_size: int) -> ImageFolder:
        """List the files, in subfolders too; DataError where there are none."""
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in EXTENSIONS and path.is_file()
        )
        if not files:
            raise DataError(f"{folder}: no image files ({', '.join(EXTENSIONS)}) in it")
        return cls(folder, image_size, tuple(files))

    @property
    def key(self) -> str:
        """Names the content: a hash of the files' places and sizes."""
        listed = [
            (path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in self.files
        ]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        return f"folder-{self.image_size}-{digest}"

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, indices: Tensor) -> npt.NDArray[np.uint8]:
        """Raises DataError for a file that is unreadable or of another size."""
        return np.stack([self._read(self.files[index]) for index in indices.tolist()])

    def _read(self, path: Path) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(path) as image:
                found = image.size
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: no readable image ({error})") from error
        if found != (self.image_size, self.image_size):
            size = f"{self.image_size} x {self.image_size}"
            raise DataError(f"{path}: {found[0]} x {found[1]} pixels; expected {size}")
        return pixels


def as_pixels(images: Pixels | npt.NDArray[np.uint8], at_least: int = 1) -> Pixels:
    """A set of images as such; InputError where it is none or of fewer than `at_least` images."""
    if not isinstance(images, Pixels):
        check_images(images, at_least)
        return ImageArray(images)
    if len(images) < at_least:
        raise InputError(f"at least {at_least} images are needed; got {len(images)}")
    return images


def evenly_strided(num_images: int, most: int) -> Tensor:
    """Indices of at most `most` of num_images images, spread evenly, int64."""
    count = min(num_images, most)
    return torch.arange(count) * num_images // max(count, 1)


def all_pixels(images: Pixels) -> npt.NDArray[Any]:
    """Every image of a set that fits into memory."""
    return images.pixels(torch.arange(len(images)))
