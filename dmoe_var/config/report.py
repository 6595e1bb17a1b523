"""Configure what the report shows, and how large it may grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dmoe_var.config_fields import STRICT, Share


@dataclass(frozen=True)
class ReportConfig:
    """What the HTML report shows, and how large it may grow."""

    __pydantic_config__ = STRICT

    labels: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Classes under the router microscope, one picture each; null takes the first four."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of these pictures."""
    tau: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    """Tau on all of moe.scales at which each picture is sampled."""
    grid_images: Annotated[int, Field(gt=0)] = 20
    """First pictures that are shown per point of a curve, dense beside dynamic."""
    picture_side: Annotated[int, Field(ge=8)] = 256
    """Pixels per side of a picture under the microscope; larger ones are scaled down."""
    grid_side: Annotated[int, Field(ge=8)] = 96
    """Pixels per side of a picture in a grid; larger ones are scaled down, as JPEG."""
    max_mb: Annotated[float, Field(gt=0)] = 20.0
    """Largest page in MB; microscope pictures beyond it are left out, and the page says so."""

    def __post_init__(self) -> None:
        if list(self.tau) != sorted(set(self.tau)):
            raise ValueError(f"tau={list(self.tau)} must be distinct and rising")
