"""Data sets, and the cache of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from dmoe_var.data.digits import ImageSet, load_digits

NUM_CLASSES = {"digits": 10}
"""Classes of each kind of data."""


@dataclass(frozen=True)
class DataConfig:
    """Which images. digits: scikit-learn's, enlarged to image_size pixels a side."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["digits"] = "digits"
    image_size: Annotated[int, Field(ge=8, multiple_of=8)] = 16


def load_data(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Training and held-out images."""
    return load_digits(config.image_size)
