"""Load CIFAR-10 into memory: 60,000 photographs of 32 x 32 pixels, in torchvision's own layout."""

from __future__ import annotations

from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmoe_var.c_library import cache_folder
from dmoe_var.data.in_memory import ImageSet, spread
from dmoe_var.errors import DataError
from dmoe_var.files import alone

if TYPE_CHECKING:  # imported where it is used: it takes a second
    from torchvision.datasets import CIFAR10

IMAGE_SIZE = 32
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""By label; in the order of the alphabet, so that class folders of these names have the same."""


def load_cifar10(
    root: str | None,
    limit: int | None = None,
    held_out: int | None = None,
    augmentations: int = 1,
    flip: bool = False,
    *,
    fetch: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """Load training (50,000) and test images (10,000), or the first of each class; see DataConfig.

    fetch: whether torchvision downloads what is missing in `root`. Raise DataError if it is not
    there and cannot be fetched.
    """
    folder = cache_folder() if root is None else Path(root).expanduser()
    sets = []
    for name, key, number in (("train", "limit", limit), ("test", "held_out", held_out)):
        dataset = _opened(folder, name == "train", fetch)
        images, labels = dataset.data, np.array(dataset.targets)
        if number is not None:
            if number > len(images):
                raise DataError(
                    f"{folder}: holds {len(images)} {name} pictures, data.{key}={number} "
                    "asks for more"
                )
            chosen = spread(labels, number)
            images, labels = images[chosen], labels[chosen]
        if name == "train":
            images, labels = _augmented(images, augmentations, flip), labels.repeat(augmentations)
        sets.append(ImageSet.named(f"cifar10-{name}", images, labels, len(CLASS_NAMES)))
    return sets[0], sets[1]


def _augmented(images: np.ndarray, number: int, flip: bool) -> np.ndarray:
    """Repeat each image `number` times; mirror every second one."""
    views = [images[:, :, ::-1] if flip and view % 2 else images for view in range(number)]
    augmented: np.ndarray = np.stack(views, axis=1).reshape(-1, *images.shape[1:])
    return augmented


def _opened(folder: Path, train: bool, fetch: bool) -> CIFAR10:
    """Open one part. torchvision reads Python's pickles, which could run anything; it does so only
    once their MD5 sums are those of the published files."""
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(folder, train)
    except (RuntimeError, OSError) as error:
        if not fetch:
            raise DataError(f"{folder}: holds no whole {CIFAR10.base_folder}") from error
    is_new = False
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):  # of several processes, the first fetches it
            return CIFAR10(folder, train, download=True)
    except (RuntimeError, OSError, HTTPException) as error:
        if is_new:  # and maybe a mistyped name
            with suppress(OSError):
                folder.rmdir()
        files = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
        raise DataError(
            f"data.kind=cifar10: {folder} (data.root) holds no whole {CIFAR10.base_folder}/ "
            f"({', '.join(files)}, {CIFAR10.meta['filename']}), and it cannot be fetched from "
            f"{CIFAR10.url} ({' '.join(str(error).split())}); put it there, or use picture files: "
            "data.kind=image_folder and their data.root"
        ) from error
