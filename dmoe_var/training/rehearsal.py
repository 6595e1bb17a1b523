"""Measure what a run will take before it starts: one micro-batch forward and backward."""

from __future__ import annotations

import math
import time

import torch

from dmoe_var.devices import peak_memory, synchronise
from dmoe_var.distributed import world_size
from dmoe_var.errors import ConfigError
from dmoe_var.models.blocks import Rows
from dmoe_var.training.state import trainable
from dmoe_var.training.step import StepGradients

ADAM_BYTES = 8
"""Bytes of AdamW's two float32 moments per trained parameter."""


def rehearse(gradients: StepGradients, batch: int, first: int, name: str) -> str:
    """Run a micro-batch of the run's steps twice (the second is timed), forget its gradients, and
    say what the run takes: time, and the process's peak on its device (CPU: of all its memory).

    batch: examples per step. first: steps that are done already. Raise ConfigError if the
    micro-batch does not fit into the device's memory.
    """
    device = gradients.device
    parameters = list(trainable(gradients.objective.module).values())
    size = gradients.size(batch)
    # Run and measure
    of_all = ""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        of_all = f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f}"
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
    # Say what all steps take
    num_trained = sum(p.numel() for p in parameters)
    memory = peak_memory(device) + (0 if first else ADAM_BYTES * num_trained)
    micro_batches = math.ceil(math.ceil(batch / size) / world_size())
    steps = gradients.num_steps - first
    hours = steps * micro_batches * seconds / 3600
    duration = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    return (
        f"{name}: about {memory / 1e9:.1f}{of_all} GB on {device} and {duration} for {steps:,} "
        f"steps, validation left out ({micro_batches} micro-batches of {size} a step in each of "
        f"{world_size()} processes, {seconds:.2f} s each; {num_trained / 1e6:.1f} M parameters "
        "train)"
    )
