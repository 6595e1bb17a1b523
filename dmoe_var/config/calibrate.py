"""Configure what a calibration aims at, and what it may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class CalibrateConfig:
    """What a calibration of tau aims at, and what it may take."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    budget: Share = 0.81
    """FLOPs of an image as a share of the dense model's, decoder left out."""
    budget_ms: Annotated[float, Field(gt=0)] | None = None
    """In place of budget: milliseconds of a batch of time_batch images here, decoder included."""
    budgets: tuple[Share, ...] = ()
    """Budgets at which all ways to choose tau are compared; an empty list compares nothing."""
    loss: Literal["ce", "ce_tokens", "norm"] = "ce"
    """Loss made equal per saved FLOP: ce (teacher-forced, sparse scales weigh the same), ce_tokens
    (tokens weigh the same) or norm (predicted norms that are dropped)."""
    by_layer: bool = False
    """Whether each layer of a scale gets a tau of its own."""
    densities: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)
    ] = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1)  # fmt: skip
    """Densities (shares of experts) at which the losses of a group are measured."""
    refinements: Annotated[int, Field(ge=0)] = 3
    """Rounds that measure the losses of all groups together; 0 trusts those of each alone."""
    images: Annotated[int, Field(gt=0)] = 256
    """Training images on which losses are measured."""
    held_out: Annotated[int, Field(gt=0)] = 256
    """Held-out images on which the result is verified."""
    drawn: Annotated[int, Field(ge=2)] = 200
    """Sampled images that correct and verify the FLOPs."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    """Images per batch."""
    time_batch: Annotated[int, Field(gt=0)] = 8
    """Images per timed batch."""
    time_repeats: Annotated[int, Field(gt=0)] = 5
    """Times that the batch is timed."""
    seed: Annotated[int, Field(ge=0, lt=2**30)] = 1000
    """Seed of the sampled images that correct the FLOPs; those that verify take the next one."""
