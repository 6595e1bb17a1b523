"""Pictures in a folder a class, as ImageNet comes, cut as published for VAR.

Nothing is decoded before it is asked for, and where a picture is cut follows from (seed, its place
in the set, which augmentation) alone: worker processes, batches and interruptions change nothing.

Legend: P pictures, K augmentations of each, N = P * K images, B batch, R image side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor

from dmoe_var.data.images import Decoded, Indices, Unreadable, scaled
from dmoe_var.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dmoe_var.data import DataConfig

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""What a picture's name ends with, in any case."""
SHOWN = 3
"""Names that an error lists."""

Listing: TypeAlias = dict[str, list[tuple[str, int]]]
"""Of each class, in order: file names, in order, with the files' sizes in bytes."""


@dataclass(frozen=True)
class Cut:
    """From a picture to R x R pixels: the shorter side resized to round(resize_ratio * R) by
    Lanczos, then the centre, or where `random` a place that each augmentation draws; no flip."""

    image_size: int
    resize_ratio: float
    random: bool
    augmentations: int
    seed: int

    def opened(self, path: Path) -> Picture:
        """The resized RGB picture of a file. Raises whatever its decoder does on broken files."""
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
        shorter = round(self.resize_ratio * self.image_size)
        sides = [int(shorter * side / min(rgb.size)) for side in rgb.size]
        return rgb.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)

    def cropped(self, picture: Picture, index: int, augmentation: int) -> np.ndarray:
        """One crop uint8 (R, R, 3) of the resized picture that is `index`-th of its set."""
        R = self.image_size
        spare = (picture.width - R, picture.height - R)
        if self.random:
            generator = np.random.default_rng([self.seed, index, augmentation])
            left, top = (int(generator.integers(pixels + 1)) for pixels in spare)
        else:
            left, top = (round(pixels / 2) for pixels in spare)
        return np.asarray(picture.crop((left, top, left + R, top + R)))


@dataclass(frozen=True, eq=False)
class FolderImages:
    """The pictures of one folder. Image p * K + k is augmentation k of picture p."""

    folder: Path
    classes: tuple[str, ...]
    """Folder names, sorted; a label is the place of a name."""
    paths_P: np.ndarray
    """Encoded paths relative to `folder`: one array, which worker processes share."""
    labels: np.ndarray
    """int64 (N,)."""
    key: str
    cut: Cut
    workers: int
    """Threads of `pixels` and `tensors`."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.folder / os.fsdecode(self.paths_P[index // self.cut.augmentations])

    def decode(self, indices: Sequence[int]) -> Decoded:
        """Readable images uint8 (B, R, R, 3) in order, and the unreadable ones.

        Neighbouring augmentations of a picture cost one decoding.
        """
        K, R = self.cut.augmentations, self.cut.image_size
        crops: list[np.ndarray] = []
        unreadable = []
        for picture_index, group in groupby(indices, lambda index: index // K):
            path = self.path(picture_index * K)
            try:
                picture = self.cut.opened(path)
            except Exception as error:  # a broken file makes decoders raise nearly anything
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                unreadable += [Unreadable(index, printable(path), reason) for index in group]
                continue
            crops += [self.cut.cropped(picture, picture_index, index % K) for index in group]
        pixels_BRR3 = np.stack(crops) if crops else np.empty((0, R, R, 3), np.uint8)
        return Decoded(pixels_BRR3, unreadable)

    def pixels(self, indices: Indices) -> np.ndarray:
        """Images uint8 (B, R, R, 3). DataError names a file that is unreadable."""
        chosen = np.asarray(indices, dtype=np.int64)
        threads = max(1, self.workers)
        parts = [part.tolist() for part in np.array_split(chosen, threads)]
        if threads == 1:
            decoded = [self.decode(parts[0])]
        else:
            with ThreadPoolExecutor(threads) as pool:
                decoded = list(pool.map(self.decode, parts))
        for part in decoded:
            for broken in part.unreadable:
                raise DataError(f"{broken.path}: unreadable picture ({broken.reason})")
        return np.concatenate([part.pixels_BRR3 for part in decoded])

    def tensors(self, indices: Indices) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1], float32. DataError names a file that is unreadable."""
        return scaled(torch.from_numpy(self.pixels(indices)))


def load_image_folders(config: DataConfig) -> tuple[FolderImages, FolderImages]:
    """Training and held-out pictures, listed but not decoded.

    Raises ConfigError without `root`; DataError for a missing folder, a class without pictures,
    training and held-out classes that differ or are not `num_classes`, or too few held-out
    pictures.
    """
    if config.root is None:
        raise ConfigError(
            f"data.root=null: data.kind=image_folder needs the folder that holds {config.train}/ "
            f"and {config.val}/, one folder a class in each"
        )
    root = Path(config.root).expanduser()
    training, held_out = root / config.train, root / config.val
    listings = [list_pictures(training)]
    listings.append(listings[0] if held_out == training else list_pictures(held_out))
    _check_classes(training, listings[0], held_out, listings[1], config.num_classes)
    for i, folder, key in ((0, training, "limit"), (1, held_out, "held_out")):
        number = getattr(config, key)
        if number is not None:
            listings[i] = balanced(listings[i], number, folder, f"data.{key}")
    cut = Cut(config.image_size, config.resize_ratio, True, config.augmentations, config.seed)
    central = replace(cut, random=False, augmentations=1, seed=0)
    return (
        _images(training, listings[0], cut, config.workers),
        _images(held_out, listings[1], central, config.workers),
    )


def list_pictures(folder: Path) -> Listing:
    """The pictures of each class folder; names that begin with a dot are passed over.

    Raises DataError where the folder is missing or a class has no picture.
    """
    listing: Listing = {}
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
        for name in names:
            with os.scandir(folder / name) as entries:
                listing[name] = sorted(
                    (entry.name, _size(entry))
                    for entry in entries
                    if entry.name.lower().endswith(EXTENSIONS) and entry.name[0] != "."
                )
    except OSError as error:
        raise DataError(
            f"{error.filename}: no readable image folder ({error.strerror}); data.root, data.train "
            "and data.val name it"
        ) from error
    empty = [name for name, pictures in listing.items() if not pictures]
    kinds = " ".join(EXTENSIONS)
    if empty:
        raise DataError(
            f"{folder}: {len(empty)} class folders hold no picture ({kinds}): {_shown(empty)}"
        )
    if not listing:
        raise DataError(f"{folder}: holds no folders, expected one a class with pictures ({kinds})")
    return listing


def printable(path: Path) -> str:
    """A path in one line of UTF-8, whatever its bytes are."""
    return str(path).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing: it is listed, and will be found unreadable
        return -1


def _shown(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_classes(
    training: Path, ours: Listing, held_out: Path, theirs: Listing, expected: int | None
) -> None:
    if expected is not None and len(ours) != expected:
        raise DataError(
            f"{training}: found {len(ours)} class folders, expected data.num_classes={expected}"
        )
    only = [
        f"{folder} alone has {_shown(sorted(a.keys() - b.keys()))}"
        for folder, a, b in ((training, ours, theirs), (held_out, theirs, ours))
        if a.keys() - b.keys()
    ]
    if only:
        raise DataError(f"training and held-out class folders differ: {'; '.join(only)}")


def balanced(listing: Listing, number: int, folder: Path, key: str) -> Listing:
    """The first pictures of each class, taken in turns until there are `number`.

    Raises DataError where there are fewer.
    """
    most = sum(map(len, listing.values()))
    if number > most:
        raise DataError(f"{folder}: holds {most} pictures, {key}={number} asks for more")
    turns = sorted(
        (turn, label) for label, files in enumerate(listing.values()) for turn in range(len(files))
    )
    taken = np.bincount([label for _, label in turns[:number]], minlength=len(listing))
    return {name: files[:n] for (name, files), n in zip(listing.items(), taken, strict=True)}


def _images(folder: Path, listing: Listing, cut: Cut, workers: int) -> FolderImages:
    content = hashlib.sha256(json.dumps([vars(cut), list(listing)], sort_keys=True).encode())
    paths = []
    for name, files in listing.items():
        for file, size in files:
            paths.append(os.fsencode(f"{name}/{file}"))
            content.update(b"%s\0%d\n" % (paths[-1], size))
    labels_P = np.repeat(np.arange(len(listing)), [len(files) for files in listing.values()])
    crop = "random" if cut.random else "centre"
    return FolderImages(
        folder=folder,
        classes=tuple(listing),
        paths_P=np.array(paths),
        labels=labels_P.repeat(cut.augmentations).astype(np.int64),
        key=f"folder-{crop}-{cut.image_size}-{content.hexdigest()[:16]}",
        cut=cut,
        workers=workers,
    )
