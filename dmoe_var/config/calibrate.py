"""What a calibration aims at, and what it may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class CalibrateConfig:
    """scripts/calibrate.py.

    budget: FLOPs of an image as a share of the dense model's (decoder left out). budget_ms, in its
    place: milliseconds of a batch of `time_batch` images on this device, decoder included.
    budgets: shares at which all ways to choose tau are compared; () compares none.
    loss: what is made equal per saved FLOP: `ce`, the teacher-forced cross-entropy of the sparse
    scales, each weighing the same; `ce_tokens`, each by its tokens; or `norm`, the squared
    predicted norms that are dropped. by_layer: a tau for each layer.
    densities: shares of experts at which a loss curve is measured. refinements: rounds in which
    measured losses of all groups together correct what those of each alone suggest; with 0 the
    latter decide. images, held_out: training and held-out images for losses; drawn: sampled images
    that correct and verify the FLOPs.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    budget: Share = 0.81
    budget_ms: Annotated[float, Field(gt=0)] | None = None
    budgets: tuple[Share, ...] = ()
    loss: Literal["ce", "ce_tokens", "norm"] = "ce"
    by_layer: bool = False
    densities: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)
    ] = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1)  # fmt: skip
    refinements: Annotated[int, Field(ge=0)] = 3
    images: Annotated[int, Field(gt=0)] = 256
    held_out: Annotated[int, Field(gt=0)] = 256
    drawn: Annotated[int, Field(ge=2)] = 200
    batch_size: Annotated[int, Field(gt=0)] = 64
    time_batch: Annotated[int, Field(gt=0)] = 8
    time_repeats: Annotated[int, Field(gt=0)] = 5
    seed: Annotated[int, Field(ge=0, lt=2**30)] = 1000
    """Of the sampled images: those that correct, and one more for those that verify."""
