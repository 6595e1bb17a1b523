"""Measure where the time of a batch goes: by part of the sampler and by scale.

The clock knows one part at a time, and changes from it to the next, so that parts cannot overlap.
What no part claims is `rest`, so that all of them sum to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from dmoe_var.models.blocks import FFN, HeadNorm, SelfAttention
from dmoe_var.moe.layer import MoEFFN
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.router import Router

PARTS = (
    "attention",
    "ffn",
    "experts",
    "router",
    "selection",
    "transformer",
    "head",
    "embedding",
    "sampling",
    "quantiser",
    "decoder",
    "rest",
)
"""ffn: FFNs that are not split. experts: split FFNs, gathering and adding included. transformer:
norms and residuals, and all of a backbone whose parts are not told apart. embedding: class, scale
inputs, AdaLN's projections. sampling: guidance, filters, draw, code vectors. rest: before the first
part and after the last."""

Stamp = float | torch.cuda.Event
"""Seconds, or an event on the device's stream."""


@dataclass(frozen=True)
class PartTimes:
    """Milliseconds of one call by part and scale (None: outside of all scales)."""

    by_part_and_scale_ms: Mapping[tuple[str, int | None], float]

    @property
    def total_ms(self) -> float:
        """The whole call, clock included."""
        return sum(self.by_part_and_scale_ms.values())

    @property
    def by_part_ms(self) -> dict[str, float]:
        """Milliseconds by part, in the order of PARTS; parts that did not run are left out."""
        found = {part for part, _ in self.by_part_and_scale_ms}
        return {
            part: sum(ms for (p, _), ms in self.by_part_and_scale_ms.items() if p == part)
            for part in PARTS
            if part in found
        }

    @property
    def by_scale_ms(self) -> list[float]:
        """Milliseconds by scale, of its embedding, transformer, sampling and quantiser."""
        scales = [si for _, si in self.by_part_and_scale_ms if si is not None]
        return [
            sum(ms for (_, s), ms in self.by_part_and_scale_ms.items() if s == si)
            for si in range(max(scales, default=-1) + 1)
        ]


def median_by_part(runs: Sequence[PartTimes]) -> dict[str, float]:
    """Take the median over runs of each part's time, ms."""
    by_run = [run.by_part_ms for run in runs]
    return {part: float(np.median([run[part] for run in by_run])) for part in by_run[0]}


def median_by_scale(runs: Sequence[PartTimes]) -> list[float]:
    """Take the median over runs of each scale's time, ms."""
    return [float(ms) for ms in np.median([run.by_scale_ms for run in runs], axis=0)]


class PartClock(Observer):
    """Measures one call of `generate(..., observer=clock)` inside `with clock.running(model)`.

    On CUDA it records events and waits for none of them before the end. On MPS, which has no such
    events, it waits at every change of part.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stamps: list[tuple[str, int | None, Stamp]] = []
        self._si: int | None = None
        self._told_apart = True

    def on_part(self, part: str, si: int | None) -> None:
        self._si = si
        self._stamps.append((part, si, self._stamp()))

    def in_layers(self) -> Observer | None:
        return self if self._told_apart else None

    @contextmanager
    def running(self, model: nn.Module, told_apart: bool = True) -> Iterator[None]:
        """Run the clock from start to end of a call of this model.

        told_apart: whether the transformer's parts are timed too, by hooks on its modules that are
        gone afterwards. If not (a compiled model and CUDA graphs have no hooks), all of a backbone
        is `transformer`, with CUDA graphs the embedding too.
        """
        self._told_apart = told_apart
        handles = [h for m in model.modules() for h in self._hook(m)] if told_apart else []
        self._stamps = []
        try:
            self.on_part("rest", None)
            yield
            self.on_part("end", None)
        finally:
            for handle in handles:
                handle.remove()

    def read(self) -> PartTimes:
        """Wait for the device and return the call's times; ValueError if no call has ended."""
        if not self._stamps or self._stamps[-1][0] != "end":
            raise ValueError("no call has ended under this clock")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        times: dict[tuple[str, int | None], float] = {}
        for (part, scale, start), (_, _, end) in pairwise(self._stamps):
            times[part, scale] = times.get((part, scale), 0.0) + _milliseconds(start, end)
        return PartTimes(times)

    def _stamp(self) -> Stamp:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def _hook(self, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Add hooks that claim a module's time, and give it back to the part around it."""
        claims = {
            SelfAttention: ("attention", "transformer"),
            FFN: ("ffn", "transformer"),
            MoEFFN: ("experts", "transformer"),
            Router: ("router", "selection"),
            HeadNorm: ("head", "head"),
        }
        if type(module) not in claims:
            return []
        before, after = claims[type(module)]
        return [
            module.register_forward_pre_hook(lambda *_: self.on_part(before, self._si)),
            module.register_forward_hook(lambda *_: self.on_part(after, self._si)),
        ]


def _milliseconds(start: Stamp, end: Stamp) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return 1000 * (float(end) - float(start))  # type: ignore[arg-type]
    return float(start.elapsed_time(end))
