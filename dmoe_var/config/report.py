"""What the report shows, and how large it may grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dmoe_var.config_fields import STRICT, Share


@dataclass(frozen=True)
class ReportConfig:
    """scripts/report.py.

    labels: classes of the pictures under the router microscope, one picture each, drawn from
    `seed`; None: the first four. tau: at which of Eq. 3's thresholds, on all sparse scales, each of
    them is drawn once more. grid_images: the first pictures of each point of the curve, dense
    beside dynamic. picture_side, grid_side: larger pictures are scaled down to that many pixels,
    those of the grids to JPEG. max_mb: the size of the page; pictures that do not fit are left out
    from under the microscope, and the page says so.
    """

    __pydantic_config__ = STRICT

    labels: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    tau: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    grid_images: Annotated[int, Field(gt=0)] = 20
    picture_side: Annotated[int, Field(ge=8)] = 256
    grid_side: Annotated[int, Field(ge=8)] = 96
    max_mb: Annotated[float, Field(gt=0)] = 20.0

    def __post_init__(self) -> None:
        if list(self.tau) != sorted(set(self.tau)):
            raise ValueError(f"tau={list(self.tau)} must be distinct and rising")
