"""Define a training step: its objective, its optimiser's settings, and gradients that neither
micro-batches nor processes change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from dmoe_var.config_fields import STRICT, Share
from dmoe_var.distributed import gathered, rank, sum_over_processes, world_size
from dmoe_var.models.blocks import Rows
from dmoe_var.training.state import trainable
from dmoe_var.training.tracking import OFF, Tracking

Positive = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule and length of a training stage."""

    __pydantic_config__ = STRICT

    steps: Annotated[int, Field(gt=0)] | None = None
    """Optimiser steps; null if epochs is given."""
    epochs: Positive | None = None
    """Passes over the training set; null if steps is given."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    """Examples per step, over all processes."""
    micro_batch_size: Annotated[int, Field(gt=0)] | None = None
    """Examples at once per process, whose gradients add up; null takes its whole share."""
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-3
    """Learning rate after the warmup."""
    lr_end: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Learning rate at the end."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate goes from lr to lr_end: constant, linear or cosine."""
    warmup: Share = 0.0
    """Share of the steps over which the learning rate rises."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Momenta of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of AdamW."""
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of a moving average of the weights, which is what is validated and kept; null
    keeps the last step's."""
    log_every: Annotated[int, Field(gt=0)] = 20
    """Steps from one line of metrics.jsonl to the next."""
    validate_every: Annotated[int, Field(gt=0)] = 200
    """Steps from one validation to the next."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 50
    """Steps from one saved state to the next."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = f"steps={self.steps}, epochs={self.epochs}"
            raise ValueError(f"exactly one of steps and epochs must be given, got {given}")

    def num_steps(self, num_examples: int) -> int:
        """Return the number of optimiser steps in all."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        batch_size = min(self.batch_size, num_examples)
        return max(1, math.ceil(self.epochs * num_examples / batch_size))

    def lr_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of step 0..num_steps - 1."""
        warmup = self.warmup * num_steps
        if step < warmup:
            return self.lr * (step + 1) / (math.ceil(warmup) + 1)
        progress = (step - warmup) / max(num_steps - warmup, 1)
        falls = {
            "constant": 0.0,
            "linear": progress,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
        }
        return self.lr + (self.lr_end - self.lr) * falls[self.schedule]


class Objective(Protocol):
    """What a stage trains, and for what."""

    module: nn.Module
    """Its parameters with requires_grad are trained."""
    num_examples: int
    repeatable: bool
    """Whether `loss` changes nothing, so that it can be tried before the run."""

    def loss(
        self, indices_B: Tensor, step: int, num_steps: int, rows: Rows
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of some training examples, and what to log beside it.

        rows: where they lie in the step's batch, for what is drawn at random.
        """

    def after_step(self, step: int, num_steps: int) -> None:
        """Act after each optimiser step (e.g. restart dead codes)."""

    def validate(self) -> dict[str, float]:
        """Measure metrics on held-out data, without randomness."""


@dataclass(frozen=True)
class Run:
    """Where and how a stage trains. `fingerprint` is a hash of its configuration."""

    folder: Path
    fingerprint: str
    name: str
    seed: int = 0
    amp_dtype: torch.dtype = torch.float32
    tracking: Tracking = OFF
    config: Mapping[str, object] | None = None
    progress: bool = True
    max_file_mb: int | None = None
    """Most megabytes per file of the state."""


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's random numbers (dropout, label dropout, code restarts)."""
    return (seed * 1_000_003 + step) % 2**31


class StepGradients:
    """Gradients of a step: micro-batch by micro-batch, process by process, summed.

    Micro-batch j of a step goes to process j mod (number of processes). On a CPU, and under
    deterministic algorithms, the sum is taken in float64 and rounded once: then its order does not
    matter, and equal micro-batches give the same weights whatever number of processes shares them.
    (AdamW turns the last bit of a gradient near zero into a step of its full length.)
    """

    def __init__(self, objective: Objective, config: OptimConfig, run: Run, num_steps: int):
        self.objective = objective
        self.run = run
        self.num_steps = num_steps
        self.micro_batch_size = config.micro_batch_size
        self.device = next(objective.module.parameters()).device
        self.exact = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        self._sums: dict[nn.Parameter, Tensor] = {}

    def size(self, total: int) -> int:
        """Choose the examples per micro-batch for a step of `total`; no process goes without."""
        share = math.ceil(total / world_size())
        return min(self.micro_batch_size or share, share)

    def compute(self, indices_B: Tensor, step: int) -> dict[str, float]:
        """Leave the gradient of a step's mean loss in the parameters. Return `loss` and all else
        that is logged, as means over the step's examples."""
        total = len(indices_B)
        size = self.size(total)
        exact = self.exact and (world_size() > 1 or size < total)
        logged: dict[str, float] = {}
        for start in range(0, total, size)[rank() :: world_size()]:
            part = indices_B[start : start + size]
            share = len(part) / total
            for name, value in self.add(part, step, Rows(start, total), share).items():
                logged[name] = logged.get(name, 0.0) + share * value
            if exact:
                self._set_aside()
        self._sum_gradients(torch.float64 if exact else None)
        return summed(logged)

    def add(self, part: Tensor, step: int, rows: Rows, share: float) -> dict[str, float]:
        """Add one micro-batch's gradient, times its share of the step."""
        torch.manual_seed(step_seed(self.run.seed, step))
        amp_dtype = self.run.amp_dtype
        with torch.autocast(self.device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            loss, logged = self.objective.loss(part, step, self.num_steps, rows)
        (loss * share).backward()
        return {"loss": loss.item(), **logged}

    def _set_aside(self) -> None:
        """Add the gradients to the float64 sums, and clear them."""
        for parameter in trainable(self.objective.module).values():
            if parameter.grad is not None:
                self._sums[parameter] = self._sums.get(parameter, 0) + parameter.grad.double()
                parameter.grad = None

    def _sum_gradients(self, dtype: torch.dtype | None) -> None:
        """Sum over the processes, in `dtype`; what has a gradient in none of them stays without."""
        parameters = list(trainable(self.objective.module).values())
        sums = self._sums if dtype else {p: p.grad for p in parameters if p.grad is not None}
        if world_size() > 1:
            used = torch.tensor([float(p in sums) for p in parameters], device=self.device)
            sum_over_processes([used])
            for parameter, count in zip(parameters, used.tolist(), strict=True):
                if count and parameter not in sums:
                    sums[parameter] = torch.zeros_like(parameter, dtype=dtype)
            sum_over_processes(sums[p] for p in parameters if p in sums)
        for parameter, total in sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums = {}


def summed(numbers: dict[str, float]) -> dict[str, float]:
    """Sum over the processes, by name; the first process, which always has a share, has all."""
    by_process = gathered(numbers)
    return {name: sum(values.get(name, 0.0) for values in by_process) for name in by_process[0]}
