"""Measure what a run will take before it starts: one micro-batch forward and backward."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dmoe_var.devices import peak_memory, synchronise, total_memory
from dmoe_var.distributed import world_size
from dmoe_var.errors import ConfigError
from dmoe_var.models.blocks import Rows
from dmoe_var.training.state import trainable

if TYPE_CHECKING:
    from dmoe_var.training.step import StepGradients

ADAM_BYTES = 8
"""Bytes of AdamW's two float32 moments per trained parameter."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes. memory_bytes: the process's peak on its device (CPU: of all its memory)."""

    name: str
    device: torch.device
    memory_bytes: int
    device_bytes: int | None
    num_trained: int
    steps: int
    micro_batches: int
    micro_batch: int
    micro_seconds: float

    @property
    def hours(self) -> float:
        """Hours for all steps, without validation and without the optimiser's own time."""
        return self.steps * self.micro_batches * self.micro_seconds / 3600

    def __str__(self) -> str:
        of_all = f" of {self.device_bytes / 1e9:.1f}" if self.device_bytes else ""
        duration = f"{self.hours:.1f} h" if self.hours >= 1 else f"{60 * self.hours:.1f} min"
        return (
            f"{self.name}: about {self.memory_bytes / 1e9:.1f}{of_all} GB on {self.device} and "
            f"{duration} for {self.steps:,} steps, validation left out ({self.micro_batches} "
            f"micro-batches of {self.micro_batch} a step in each of {world_size()} processes, "
            f"{self.micro_seconds:.2f} s each; {self.num_trained / 1e6:.1f} M parameters train)"
        )


def rehearse(gradients: StepGradients, batch: int, first: int, name: str) -> Estimate:
    """Run a micro-batch of the run's steps twice (the second is timed), and forget its gradients.

    batch: examples per step. first: steps that are done already. Raise ConfigError if the
    micro-batch does not fit into the device's memory.
    """
    device = gradients.device
    parameters = list(trainable(gradients.objective.module).values())
    size = gradients.size(batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(2):
            started = time.perf_counter()
            gradients.add(torch.arange(size), 0, Rows(0, batch), share=size / batch)
            synchronise(device)
            seconds = time.perf_counter() - started
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{name}.micro_batch_size={size}: does not fit into {device}'s memory; allowed: "
            "smaller ones, and activation_checkpointing=true where the stage has it"
        ) from error
    for parameter in parameters:
        parameter.grad = None
    num_trained = sum(p.numel() for p in parameters)
    return Estimate(
        name,
        device,
        peak_memory(device) + (0 if first else ADAM_BYTES * num_trained),
        total_memory(device),
        num_trained,
        gradients.num_steps - first,
        math.ceil(math.ceil(batch / size) / world_size()),
        size,
        seconds,
    )
