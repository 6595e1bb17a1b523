"""The one training loop. Stages differ by their objective alone.

Everything random in a step follows from (seed, step), so that a run that was killed and started
again ends with bitwise the weights of one that was left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from dmoe_var.errors import TrainingDiverged
from dmoe_var.training.state import STATE_FILE, StateFile, trainable
from dmoe_var.training.tracking import MetricsLog, WandbMode

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule and length of a training stage.

    The length is `steps`, or `epochs` of the training set where steps is None. The learning rate
    rises linearly over `warmup` (a share of all steps), then goes from `lr` to `lr_end` along
    `schedule`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: Annotated[int, Field(gt=0)] | None = None
    epochs: Positive | None = None
    batch_size: Annotated[int, Field(gt=0)] = 64
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-3
    lr_end: Annotated[float, Field(ge=0, le=10)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Fraction = 0.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    clip: Positive = 1.0
    log_every: Annotated[int, Field(gt=0)] = 20
    validate_every: Annotated[int, Field(gt=0)] = 200
    checkpoint_every: Annotated[int, Field(gt=0)] = 50

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = f"steps={self.steps}, epochs={self.epochs}"
            raise ValueError(f"exactly one of steps and epochs must be given, got {given}")

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps in all."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        batch_size = min(self.batch_size, num_examples)
        return max(1, math.ceil(self.epochs * num_examples / batch_size))

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of step 0..num_steps - 1."""
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

    def loss(self, indices_B: Tensor, step: int, num_steps: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch of training examples, and what to log beside it."""
        ...

    def after_step(self, step: int, num_steps: int) -> None:
        """Called after each optimiser step (e.g. to restart dead codes)."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data; no randomness."""
        ...


@dataclass(frozen=True)
class Run:
    """Where and how a stage trains. `fingerprint` is a hash of its configuration."""

    folder: Path
    fingerprint: str
    name: str
    seed: int = 0
    amp_dtype: torch.dtype = torch.float32
    wandb: WandbMode = "disabled"
    config: Mapping[str, object] | None = None
    progress: bool = True


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's random numbers (dropout, label dropout, code restarts)."""
    return (seed * 1_000_003 + step) % 2**31


class BatchOrder:
    """Examples of each step: one shuffled epoch after the other, a pure function of the step."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples = num_examples
        self.batch_size = min(batch_size, num_examples)
        self.seed = seed

    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(self.seed + 7, epoch))
        return torch.randperm(self.num_examples, generator=generator)

    def batch(self, step: int) -> Tensor:
        """Indices (B,) of a step; a batch may span two epochs."""
        epoch, start = divmod(step * self.batch_size, self.num_examples)
        indices = self._epoch(epoch)[start : start + self.batch_size]
        missing = self.batch_size - len(indices)
        return torch.cat([indices, self._epoch(epoch + 1)[:missing]]) if missing else indices


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """As published: no decay on biases and other 1-D parameters, positions, levels, AdaLN offsets
    and attention temperatures."""
    exempt = ("pos_", "lvl_embed", "ada_gss", "scale_mul", "bias", "b1_ED")
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in trainable(module).items():
        spared = parameter.ndim <= 1 or any(part in name for part in exempt)
        (kept if spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def train(objective: Objective, config: OptimConfig, run: Run) -> dict[str, float]:
    """Train to the end, from the stored state where there is one; the last validation's metrics.

    Raises TrainingDiverged at a loss or gradient that is not finite: the state file then holds
    the last good step.
    """
    module = objective.module
    device = next(module.parameters()).device
    groups = parameter_groups(module, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    state = StateFile(run.folder / STATE_FILE, run.fingerprint)
    num_steps = config.num_steps(objective.num_examples)
    order = BatchOrder(objective.num_examples, config.batch_size, run.seed)
    first = state.load(module, optimizer)
    metrics: dict[str, float] = {}
    started = time.perf_counter()
    with (
        MetricsLog(run.folder, first, run.wandb, run.name, run.config) as log,
        tqdm(total=num_steps, initial=first, desc=run.name, disable=not run.progress) as bar,
    ):
        for step in range(first, num_steps):
            module.train()
            torch.manual_seed(step_seed(run.seed, step))
            lr = config.lr_at(step, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            enabled = run.amp_dtype != torch.float32
            with torch.autocast(device.type, run.amp_dtype, enabled=enabled):
                loss, logged = objective.loss(order.batch(step), step, num_steps)
            _update(loss, module, optimizer, config.clip, step, run)
            objective.after_step(step, num_steps)
            done = step + 1
            bar.update()
            last = done == num_steps
            if done % config.log_every == 0 or last:
                seconds = (time.perf_counter() - started) / (done - first)
                log.write(done, {"loss": loss.item(), "lr": lr, "step_s": seconds, **logged})
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if done % config.validate_every == 0 or last:
                module.eval()
                with torch.no_grad():
                    metrics = objective.validate()
                _check_finite(metrics, done, run)
                log.write(done, metrics)
            if done % config.checkpoint_every == 0 or last:
                state.save(done, module, optimizer)
    module.eval()
    if not metrics:  # killed after its last step: the weights are there, the metrics are not
        with torch.no_grad():
            metrics = objective.validate()
    return metrics


def _check_finite(metrics: Mapping[str, float], done: int, run: Run) -> None:
    """TrainingDiverged where a validation metric is not finite, before the state is saved."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise TrainingDiverged(
            f"{run.name}: {broken[0]} is not finite after step {done}; {kept(run)}"
        )


def kept(run: Run) -> str:
    """Where the last good state is, in words."""
    path = run.folder / STATE_FILE
    return f"the last good state is {path}" if path.exists() else "no state was saved yet"


def _update(
    loss: Tensor,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: float,
    step: int,
    run: Run,
) -> None:
    """One optimiser step, refused where the loss or its gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trainable(module).values(), clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise TrainingDiverged(
            f"{run.name}: loss {loss.item()}, gradient norm {norm.item()} at step {step + 1}; "
            f"{kept(run)}"
        )
    optimizer.step()
