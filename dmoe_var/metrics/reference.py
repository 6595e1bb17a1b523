"""Load what generated images are compared with: training images, a reference file or a folder.

Legend: M reference images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe_var.data.image_sets import KeyedPixels
from dmoe_var.errors import DataError
from dmoe_var.metrics.feature_statistics import Features, Statistics
from dmoe_var.metrics.fidelity import Fidelity
from dmoe_var.metrics.image_files import IMAGES, open_images

HASHES = "hashes"
"""Folder with the hashes of a folder's files, beside the folder of the statistics."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference set, as a network sees it."""

    statistics: Statistics
    features_MD: Features | None
    """What precision and recall are measured against; None if they are not measured."""
    about: Mapping[str, Any]
    """For a record: which set it is and, under `precision_recall`, how these were measured, or why
    they were not."""


def load_reference(
    fidelity: Fidelity,
    training: Callable[[], KeyedPixels],
    image_size: int,
    cache_dir: Path,
    *,
    progress: bool = False,
) -> Reference:
    """Load the reference that `fidelity.config` names, for samples of image_size pixels per side.

    training: opens the training images, if they are the reference. What is computed from images
    is kept in cache_dir by their content, and hashes of a folder's files beside it. Raise
    DataError for a file or folder that is missing, unreadable, not of this network or size, or
    changes meanwhile.
    """
    config = fidelity.config
    if config.reference is None:
        images = training()
        about = {"reference": f"training images ({images.key})"}
        return _measured(fidelity, None, images, cache_dir, about, progress)
    path = Path(config.reference).expanduser()
    hashes = cache_dir.parent / HASHES
    found = open_images(
        "fidelity.reference", path, image_size, hashes, images_too=config.precision_recall
    )
    about = {"reference": str(path), "reference_sha256": found.sha256}
    stored = Statistics.load(path, fidelity.network) if found.statistics else None
    reference = _measured(fidelity, stored, found.images, cache_dir, about, progress)
    try:
        found.check_unchanged(hashes)
    except DataError:
        if found.images is not None:
            fidelity.forget(cache_dir, found.images.key)
        raise
    return reference


def _measured(
    fidelity: Fidelity,
    statistics: Statistics | None,
    images: KeyedPixels | None,
    cache_dir: Path,
    about: dict[str, Any],
    progress: bool,
) -> Reference:
    """Take mu and sigma as they stand in a file, or else those of the images. Images that lie
    beside mu and sigma serve precision and recall alone."""
    if statistics is None:
        assert images is not None
        statistics = fidelity.reference(images, cache_dir, images.key, progress=progress)
        about["reference_images"] = len(images)
    if not fidelity.config.precision_recall:
        return Reference(statistics, None, about)
    source, neighbours = about["reference"], fidelity.config.neighbours
    if images is None:
        about["precision_recall"] = (
            f"not measured: {Path(source).name} holds no images ({IMAGES}) to take features of"
        )
        return Reference(statistics, None, about)
    features_MD = fidelity.reference_features(images, cache_dir, images.key, progress=progress)
    if len(features_MD) <= neighbours:
        raise DataError(
            f"{source}: {len(features_MD)} images; precision and recall with "
            f"fidelity.neighbours={neighbours} need more than {neighbours}"
        )
    about["precision_recall"] = (
        f"{neighbours} nearest neighbours, {len(features_MD)} reference images"
    )
    return Reference(statistics, features_MD, about)
