"""Load data sets, and cache their tokens."""

from __future__ import annotations

from pathlib import Path

from dmoe_var.data.cifar10 import load_cifar10
from dmoe_var.data.config import DataConfig
from dmoe_var.data.digits import load_digits
from dmoe_var.data.image_folder import load_image_folders
from dmoe_var.data.images import Images
from dmoe_var.data.in_memory import KeptImages


def load_data(
    config: DataConfig,
    num_classes: int | None = None,
    *,
    hashes: Path | None = None,
    progress: bool = False,
    fetch: bool = True,
) -> tuple[Images, Images]:
    """Load training and held-out images.

    num_classes: the classes of the model that their labels are for (None: as many as the data
    has). hashes: a folder that keeps hashes of picture files between runs. fetch: whether a set is
    downloaded that is not on this machine. Raise ConfigError if image_folder has no `root`, and
    DataError if its folders are not as DataConfig says, or if a set is not to be had.
    """
    if config.kind == "digits":
        return load_digits(config.image_size)
    if config.kind == "cifar10":
        limits, views = (config.limit, config.held_out), (config.augmentations, config.flip)
        return load_cifar10(config.root, *limits, *views, fetch=fetch)
    training, held_out = load_image_folders(config, num_classes, hashes, progress)
    if config.in_memory:
        return KeptImages(training), KeptImages(held_out)
    return training, held_out
