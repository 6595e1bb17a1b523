"""Load data sets, and cache their tokens."""

from __future__ import annotations

from pathlib import Path

from dmoe_var.data.config import DataConfig
from dmoe_var.data.digits import load_digits
from dmoe_var.data.image_folder import load_image_folders
from dmoe_var.data.images import Images


def load_data(
    config: DataConfig,
    num_classes: int | None = None,
    *,
    hashes: Path | None = None,
    progress: bool = False,
) -> tuple[Images, Images]:
    """Load training and held-out images.

    num_classes: the classes of the model that their labels are for (None: as many as the data
    has). hashes: a folder that keeps hashes of picture files between runs. Raise ConfigError if
    image_folder has no `root`, and DataError if its folders are not as DataConfig says.
    """
    if config.kind == "digits":
        return load_digits(config.image_size)
    return load_image_folders(config, num_classes, hashes, progress)
