"""What generated images are compared with: the training images, a reference file or a folder.

Legend: M reference images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dmoe_var.arrays import map_npz, names_in
from dmoe_var.errors import DataError
from dmoe_var.files import sha256_of
from dmoe_var.metrics.fidelity import Features, Fidelity, Statistics
from dmoe_var.metrics.image_sets import ImageArray, ImageFolder, Pixels

ADM_IMAGES = "arr_0"
"""Name of the images in a reference file of the ADM evaluator."""


class KeyedPixels(Pixels, Protocol):
    """A set of images, and a name for its content."""

    @property
    def key(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference set, as a network sees it."""

    statistics: Statistics
    features_MD: Features | None
    """What precision and recall are measured against; None where they are not measured."""
    about: Mapping[str, Any]
    """For a record: which set it is and, by `precision_recall`, how these were measured, or why
    they were not."""


def load_reference(
    fidelity: Fidelity,
    training: Callable[[], KeyedPixels],
    image_size: int,
    cache_dir: Path,
    *,
    progress: bool = False,
) -> Reference:
    """The reference that `fidelity.config` names, for samples of image_size pixels a side.

    training: opens the training images, where they are the reference. What is computed of images
    is kept in cache_dir. Raises DataError for a file or folder that is missing, unreadable or not
    of this network or size.
    """
    config = fidelity.config
    if config.reference is None:
        images = training()
        about = {"reference": f"training images ({images.key})"}
        return _of_images(fidelity, images, cache_dir, about, progress)
    path = Path(config.reference)
    about = {"reference": str(path)}
    if path.is_dir():
        folder = ImageFolder.open(path, image_size)
        return _of_images(fidelity, folder, cache_dir, about, progress)
    if not path.is_file():
        raise DataError(f"fidelity.reference={path}: no such .npz file or folder of images")
    statistics = Statistics.load(path, fidelity.num_features)
    about["reference_sha256"] = sha256_of(path)
    if not config.precision_recall:
        return Reference(statistics, None, about)
    if ADM_IMAGES not in names_in(path):
        about["precision_recall"] = (
            f"not measured: {path.name} holds no images ({ADM_IMAGES}) to take features of"
        )
        return Reference(statistics, None, about)
    images_of_file = _images_of(path, image_size)
    key = f"{about['reference_sha256']}-{ADM_IMAGES}"
    features = fidelity.reference_features(images_of_file, cache_dir, key, progress=progress)
    about["precision_recall"] = _measured(fidelity, features, path)
    return Reference(statistics, features, about)


def _of_images(
    fidelity: Fidelity,
    images: KeyedPixels,
    cache_dir: Path,
    about: dict[str, Any],
    progress: bool,
) -> Reference:
    statistics = fidelity.reference(images, cache_dir, images.key, progress=progress)
    about["reference_images"] = len(images)
    if not fidelity.config.precision_recall:
        return Reference(statistics, None, about)
    features = fidelity.reference_features(images, cache_dir, images.key, progress=progress)
    about["precision_recall"] = _measured(fidelity, features, about["reference"])
    return Reference(statistics, features, about)


def _measured(fidelity: Fidelity, features_MD: Features, source: object) -> str:
    """How precision and recall are measured; DataError where the set is too small for it."""
    neighbours = fidelity.config.neighbours
    if len(features_MD) <= neighbours:
        raise DataError(
            f"{source}: {len(features_MD)} images; precision and recall with "
            f"fidelity.neighbours={neighbours} need more than {neighbours}"
        )
    return f"{neighbours} nearest neighbours, {len(features_MD)} reference images"


def _images_of(path: Path, image_size: int) -> ImageArray:
    """The images of a reference file; DataError where they are not of this size."""
    images = map_npz(path, ADM_IMAGES)
    expected = (image_size, image_size, 3)
    if images.dtype != np.uint8 or images.shape[1:] != expected:
        found = f"{images.dtype} {images.shape}"
        raise DataError(f"{path}: {ADM_IMAGES} is {found}; expected uint8 {('N', *expected)}")
    return ImageArray(images)
