"""Train every stage with one loop. Stages differ by their objective alone.

Everything random in a step follows from (seed, step), so that a run that was killed and started
again ends with bitwise the weights of one that was left alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dmoe_var.distributed import gathered, is_main
from dmoe_var.errors import CheckpointError, TrainingDiverged
from dmoe_var.training.average import AveragedWeights
from dmoe_var.training.rehearsal import rehearse
from dmoe_var.training.state import STATE_FILE, StateFile, trainable
from dmoe_var.training.step import Objective, OptimConfig, Run, StepGradients, step_seed
from dmoe_var.training.tracking import MetricsLog

LONG_RUN = 20
"""Fewest steps for which a run is rehearsed."""


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
        """Return the indices (B,) of a step; a batch may span two epochs."""
        epoch, start = divmod(step * self.batch_size, self.num_examples)
        indices = self._epoch(epoch)[start : start + self.batch_size]
        missing = self.batch_size - len(indices)
        return torch.cat([indices, self._epoch(epoch + 1)[:missing]]) if missing else indices


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Group parameters as published: no decay on biases and other 1-D ones, positions, levels,
    AdaLN offsets and attention temperatures."""
    exempt = ("pos_", "lvl_embed", "ada_gss", "scale_mul", "bias", "b1_ED")
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in trainable(module).items():
        is_spared = parameter.ndim <= 1 or any(part in name for part in exempt)
        (spared if is_spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


class Snapshots(NamedTuple):
    """Says how often copies of the weights are kept, and how: `keep` is given the step."""

    every: int
    keep: Callable[[int], None]


def train(
    objective: Objective, config: OptimConfig, run: Run, snapshots: Snapshots | None = None
) -> dict[str, float]:
    """Train to the end, from the stored state if there is one. Return the last validation metrics.
    Validation, snapshots and the caller find the averaged weights in the module if there are any.

    Raise TrainingDiverged for a loss, gradient or metric that is not finite; the state file then
    holds the last good step.
    """
    module = objective.module
    groups = parameter_groups(module, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    # Resume stored state. The number of examples stands for the data: it sets the batches' order.
    fingerprint = f"{run.fingerprint}, {objective.num_examples} examples"
    state = StateFile(run.folder / STATE_FILE, fingerprint, run.max_file_mb)
    num_steps = config.num_steps(objective.num_examples)
    order = BatchOrder(objective.num_examples, config.batch_size, run.seed)
    average = None if config.ema is None else AveragedWeights(module, config.ema)
    averages = {} if average is None else average.tensors
    first = state.load(module, optimizer, averages)
    if len(set(gathered(first))) > 1:
        raise CheckpointError(
            f"{state.path}: the processes found different states: {gathered(first)}"
        )
    # Rehearse long runs
    step_gradients = StepGradients(objective, config, run, num_steps)
    if is_main() and objective.repeatable and num_steps - first >= LONG_RUN:
        module.train()
        estimate = rehearse(step_gradients, order.batch_size, first, run.name)
        if run.progress:
            tqdm.write(estimate, file=sys.stderr)
    metrics: dict[str, float] = {}
    started = time.perf_counter()
    with (
        MetricsLog(run.folder, first, run.tracking, run.config) as log,
        tqdm(total=num_steps, initial=first, desc=run.name, disable=not run.progress) as bar,
    ):
        for step in range(first, num_steps):
            # Take one step
            done, last = step + 1, step + 1 == num_steps
            module.train()
            lr = config.lr_at(step, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            logged = step_gradients.compute(order.batch(step), step)
            norm = nn.utils.clip_grad_norm_(trainable(module).values(), config.clip).item()
            _check_finite({"loss": logged["loss"], "gradient norm": norm}, done, run)
            optimizer.step()
            objective.after_step(step, num_steps)
            if average is not None:
                average.update(step)
            # Log, validate, save
            bar.update()
            if done % config.log_every == 0 or last:
                seconds = (time.perf_counter() - started) / (done - first)
                loss, *others = logged.items()
                log.write(done, dict([loss, ("lr", lr), ("step_s", seconds), *others]))
                bar.set_postfix(loss=f"{logged['loss']:.4f}")
            validates = done % config.validate_every == 0 or last
            kept = snapshots if snapshots and done % snapshots.every == 0 else None
            if validates or kept:
                module.eval()
                with torch.no_grad(), nullcontext() if average is None else average.in_place():
                    if validates:
                        bar.set_description(f"{run.name}, validating")  # which may take minutes
                        metrics = objective.validate()
                        bar.set_description(run.name)
                    if kept and is_main():
                        kept.keep(done)
            if validates:
                _check_finite(metrics, done, run)
                log.write(done, metrics)
            if (done % config.checkpoint_every == 0 or last) and is_main():
                state.save(done, module, optimizer, averages)
    if average is not None:
        average.put()
    module.eval()
    if not metrics:  # killed after its last step: the weights are there, the metrics are not
        with torch.no_grad():
            metrics = objective.validate()
    return metrics


def _check_finite(numbers: Mapping[str, float], step: int, run: Run) -> None:
    """Raise TrainingDiverged if a number of a step, counted from 1, is not finite. This comes
    before the step's state is saved."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            path = run.folder / STATE_FILE
            state = f"the last good state is {path}" if path.exists() else "no state was saved yet"
            raise TrainingDiverged(f"{run.name}: {name} is {value} at step {step}; {state}")
