"""Load pictures from one folder per class, as ImageNet comes, and cut them as published for VAR.

Nothing is decoded before it is asked for. The place of a crop follows from (seed, the picture's
index in its set, augmentation) alone: threads, batches and interruptions change nothing.

Legend: P pictures, K augmentations of each, N = P * K images, B batch, R image side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor

from dmoe_var.data.class_folders import (
    SHOWN_LABELS,
    Listing,
    balanced,
    labels_of,
    list_pictures,
    shown,
)
from dmoe_var.data.images import CPU, Decoded, Indices, Unreadable, scaled
from dmoe_var.data.pictures import UnreadablePictureError, open_rgb
from dmoe_var.distributed import is_main
from dmoe_var.errors import ConfigError, DataError
from dmoe_var.files import note, sha256_of_all

if TYPE_CHECKING:
    from dmoe_var.data.config import DataConfig

WIDEST = 32
"""Largest ratio of a picture's longer to its shorter side before it is enlarged. Of a longer
picture only the middle is kept; the whole would take gigabytes."""


@dataclass(frozen=True)
class Cut:
    """How a picture becomes R x R pixels. Lanczos resizes its shorter side to round(resize_ratio *
    R). The crop is the centre or, if `random`, a random place per augmentation, of which `flip`
    mirrors every second."""

    image_size: int
    resize_ratio: float
    random: bool
    augmentations: int
    seed: int
    flip: bool = False

    def opened(self, path: Path) -> Picture:
        """Open a file as a resized RGB picture. Raise UnreadablePictureError if it cannot be."""
        rgb = _shortened(open_rgb(path))
        shorter = round(self.resize_ratio * self.image_size)
        sides = [int(shorter * side / min(rgb.size)) for side in rgb.size]
        return rgb.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)

    def cropped(self, picture: Picture, index: int, augmentation: int) -> np.ndarray:
        """Crop the resized picture that is `index`-th of its set to uint8 (R, R, 3)."""
        R = self.image_size
        spare = (picture.width - R, picture.height - R)
        if self.random:
            generator = np.random.default_rng([self.seed, index, augmentation])
            left, top = (int(generator.integers(pixels + 1)) for pixels in spare)
        else:
            left, top = (round(pixels / 2) for pixels in spare)
        pixels_RR3 = np.asarray(picture.crop((left, top, left + R, top + R)))
        return pixels_RR3[:, ::-1] if self.flip and augmentation % 2 else pixels_RR3

    @property
    def key(self) -> dict[str, Any]:
        """What the pixels depend on; unset `flip` is left out, as caches without it have it."""
        return {k: v for k, v in asdict(self).items() if k != "flip" or v}


def _shortened(picture: Picture) -> Picture:
    """Keep the middle of a picture that is more than WIDEST times as long as short. Up to three
    pixels more are kept: an even number goes at each end, and the centre's rounding stays."""
    most = WIDEST * min(picture.size)
    left, top = (max(0, side - most) // 4 * 2 for side in picture.size)
    if left == top == 0:
        return picture
    return picture.crop((left, top, picture.width - left, picture.height - top))


@dataclass(frozen=True, eq=False)
class FolderImages:
    """The pictures of one folder. Image p * K + k is augmentation k of picture p."""

    folder: Path
    classes: Mapping[str, int]
    """Label of each class folder, in order."""
    num_classes: int
    """Classes of the model; some may have no folder."""
    paths_P: np.ndarray
    """Encoded paths relative to `folder`, in one array: Python strings take three times as much."""
    labels: np.ndarray
    """int64 (N,)."""
    passed_over: Counter[str]
    cut: Cut
    workers: int
    """Number of threads in `pixels` and `tensors`."""
    hashes: Path | None = None
    """Folder of the ledgers that keep hashes of files between runs."""
    progress: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def key(self) -> str:
        """Hash of the files' contents in order, their labels and the cut. Reads every file that
        the ledger does not know, once."""
        paths = [os.fsdecode(path) for path in self.paths_P]
        files = sha256_of_all(self.folder, paths, self.hashes, progress=self.progress)
        content = hashlib.sha256(json.dumps([self.cut.key, files]).encode())
        content.update(self.labels.tobytes())
        crop = "random" if self.cut.random else "centre"
        return f"folder-{crop}-{self.cut.image_size}-{content.hexdigest()[:16]}"

    def about(self) -> dict[str, Any]:
        return {
            "content": self.key,
            "classes": dict(self.classes),
            "passed_over": dict(self.passed_over),
        }

    def path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.folder / os.fsdecode(self.paths_P[index // self.cut.augmentations])

    def decode(self, indices: Sequence[int]) -> Decoded:
        """Return the readable images, uint8 (B, R, R, 3) in order, and the unreadable ones.

        Neighbouring augmentations of a picture cost one decoding.
        """
        K, R = self.cut.augmentations, self.cut.image_size
        crops: list[np.ndarray] = []
        unreadable = []
        for picture_index, group in groupby(indices, lambda index: index // K):
            try:
                picture = self.cut.opened(self.path(picture_index * K))
            except UnreadablePictureError as error:
                unreadable += [Unreadable(index, error.path, error.reason) for index in group]
                continue
            crops += [self.cut.cropped(picture, picture_index, index % K) for index in group]
        pixels_BRR3 = np.stack(crops) if crops else np.empty((0, R, R, 3), np.uint8)
        return Decoded(pixels_BRR3, unreadable)

    def pixels(self, indices: Indices) -> np.ndarray:
        """Return images, uint8 (B, R, R, 3). Raise DataError, naming a file that is unreadable."""
        threads = max(1, self.workers)
        parts = np.array_split(np.asarray(indices, dtype=np.int64), threads)
        with ThreadPoolExecutor(threads) as pool:
            decoded = list(pool.map(lambda part: self.decode(part.tolist()), parts))
        for part in decoded:
            for broken in part.unreadable:
                raise UnreadablePictureError(Path(broken.path), broken.reason)
        return np.concatenate([part.pixels_BRR3 for part in decoded])

    def tensors(self, indices: Indices, device: torch.device = CPU) -> Tensor:
        """Return images (B, 3, R, R) in [-1, 1], float32. Raise DataError as `pixels` does."""
        return scaled(torch.from_numpy(self.pixels(indices)).to(device))


def load_image_folders(
    config: DataConfig, num_classes: int | None, hashes: Path | None, progress: bool
) -> tuple[FolderImages, FolderImages]:
    """List training and held-out pictures without decoding them; see `load_data`.

    Raise ConfigError without `root`, and DataError for a missing folder, a class without pictures,
    training and held-out classes that differ or whose labels are unknown, or too few pictures.
    """
    if config.root is None:
        raise ConfigError(
            f"data.root=null: data.kind=image_folder needs the folder that holds {config.train}/ "
            f"and {config.val}/, one folder a class in each"
        )
    # List both folders
    root = Path(config.root).expanduser()
    training, held_out = root / config.train, root / config.val
    listings = [list_pictures(training)]
    listings.append(listings[0] if held_out == training else list_pictures(held_out))
    # Label the classes
    classes, num_classes = _classes(listings[0], listings[1], config.num_classes, num_classes)
    if is_main():
        note(_labels_line(root, classes, num_classes))
        for line in filter(None, (listing.line() for listing in listings)):
            note(line)
    # Build both sets
    how = (config.augmentations, config.seed, config.flip)
    random = Cut(config.image_size, config.resize_ratio, True, *how)
    central = replace(random, random=False, augmentations=1, seed=0, flip=False)
    sets = []
    for listing, cut, key in ((listings[0], random, "limit"), (listings[1], central, "held_out")):
        pictures, number = listing.pictures, getattr(config, key)
        if number is not None:
            pictures = balanced(pictures, number, listing.folder, f"data.{key}")
        paths = [os.fsencode(f"{name}/{path}") for name in classes for path in pictures[name]]
        labels_P = np.repeat(list(classes.values()), [len(pictures[name]) for name in classes])
        sets.append(
            FolderImages(
                folder=listing.folder,
                classes=classes,
                num_classes=num_classes,
                paths_P=np.array(paths),
                labels=labels_P.repeat(cut.augmentations).astype(np.int64),
                passed_over=listing.passed_over,
                cut=cut,
                workers=config.workers,
                hashes=hashes,
                progress=progress,
            )
        )
    return sets[0], sets[1]


def _classes(
    ours: Listing, theirs: Listing, folders: int | None, num_classes: int | None
) -> tuple[dict[str, int], int]:
    """Label each class folder, and count the classes.

    folders: data.num_classes. num_classes: the model's, if there is one.
    """
    names, others = ours.pictures.keys(), theirs.pictures.keys()
    only = [
        f"{listing.folder} alone has {shown(sorted(alone))}"
        for listing, alone in ((ours, names - others), (theirs, others - names))
        if alone
    ]
    if only:
        raise DataError(f"training and held-out class folders differ: {'; '.join(only)}")
    expected = num_classes or folders or len(names)
    labels = labels_of(tuple(names), expected)
    if labels is None or folders not in (None, len(names), expected):
        of_model = num_classes is not None and folders in (None, len(names), expected)
        wanted = f"var.num_classes={expected}" if of_model else f"data.num_classes={folders}"
        raise DataError(
            f"{ours.folder}: found {len(names)} class folders, expected {wanted}; fewer are "
            "possible where their names say which of the model's classes they are: "
            f"0..{expected - 1}, or wnids of ImageNet's 1,000; a model of its own takes any number "
            f"(var.num_classes={len(names)}, base.var=null)"
        )
    return dict(zip(names, labels, strict=True)), expected


def _labels_line(root: Path, classes: Mapping[str, int], num_classes: int) -> str:
    pairs = [f"{name} = {label}" for name, label in classes.items()]
    if len(pairs) > SHOWN_LABELS:
        pairs = [*pairs[:SHOWN_LABELS], "...", pairs[-1]]
    count = len(classes) if len(classes) == num_classes else f"{len(classes)} of {num_classes}"
    return f"{root}: {count} classes, folder = label: {', '.join(pairs)}"
