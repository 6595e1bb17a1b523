"""Measure what a tau costs in milliseconds on this device: a table by scale and density."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from dmoe_var.devices import synchronise
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.observer import Observer, joined
from dmoe_var.moe.selection import Selection
from dmoe_var.sampling.sampler import generate


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of a batch. fixed_ms: all but the sparse scales, the decoder included. by_scale:
    for each sparse scale its (density, ms), rising in both. dense_ms: the whole dense model;
    whole_ms: the whole of each setting that was timed."""

    fixed_ms: float
    by_scale: Mapping[int, tuple[tuple[float, float], ...]]
    dense_ms: float
    whole_ms: Mapping[str, float]

    def ms(self, densities: Mapping[int, float]) -> float:
        """Interpolate the time of a batch whose sparse scales run at these densities."""
        total = self.fixed_ms
        for si, points in self.by_scale.items():
            at, times = zip(*points, strict=True)
            total += float(np.interp(densities[si], at, times))
        return total

    def as_lists(self) -> dict[str, list[list[float]]]:
        """Turn `by_scale` into lists for JSON."""
        return {str(si): [list(point) for point in of] for si, of in self.by_scale.items()}

    @property
    def fastest_ms(self) -> float:
        return self.ms({si: points[0][0] for si, points in self.by_scale.items()})


class _Ends(Observer):
    """Notes the start, and when each scale's work has ended, in seconds."""

    def __init__(self) -> None:
        self.seconds = [time.perf_counter()]

    def on_scale(self, si: int, f_hat_BCHW: Tensor) -> None:
        synchronise(f_hat_BCHW.device)
        self.seconds.append(time.perf_counter())

    def in_layers(self) -> None:
        return None


def timed(
    model: VAR | DynamicVAR,
    vqvae: VQVAE,
    labels: Tensor,
    seed: int,
    observer: Observer | None = None,
    **options: Any,
) -> tuple[list[float], float]:
    """Time each scale of one call of `generate`, and what comes after the last, in milliseconds."""
    ends = _Ends()
    images = generate(model, vqvae, labels, seed=seed, observer=joined(observer, ends), **options)
    synchronise(images.device)
    times = 1000 * np.diff([*ends.seconds, time.perf_counter()])
    return times[:-1].tolist(), float(times[-1])


def measure_costs(
    dense: VAR,
    model: DynamicVAR,
    vqvae: VQVAE,
    labels: Tensor,
    settings: Mapping[str, Selection],
    repeats: int,
    seed: int,
    progress: Callable[[], object],
    **options: Any,
) -> CostTable:
    """Time the dense model and every setting in turn, `repeats` rounds after one to warm up."""
    dense_ms: list[float] = []
    runs: dict[str, list[tuple[list[float], float]]] = {name: [] for name in settings}
    densities: dict[str, dict[int, float]] = {}
    # Time in turn
    for _ in range(repeats + 1):
        scales, decoder = timed(dense, vqvae, labels, seed, **options)
        dense_ms.append(sum(scales) + decoder)
        for name, selection in settings.items():
            counts = ExpertCounts()
            run = timed(model, vqvae, labels, seed, counts, selection=selection, **options)
            runs[name].append(run)
            num_experts = model.moe.config.num_experts
            densities[name] = {
                si: counts.per_token(si).float().mean().item() / num_experts
                for si in model.moe_scales
            }
        progress()
    # Medians of all rounds but the first
    runs = {name: of_setting[1:] for name, of_setting in runs.items()}
    rest = [
        sum(scales) - sum(scales[si] for si in model.moe_scales) + decoder
        for of_setting in runs.values()
        for scales, decoder in of_setting
    ]
    table = {}
    for si in model.moe_scales:
        points = {
            densities[name][si]: median(scales[si] for scales, _ in of_setting)
            for name, of_setting in runs.items()
        }
        at, times = zip(*sorted(points.items()), strict=True)
        # More experts never take less time: if they seem to, that is noise.
        table[si] = tuple(zip(at, np.maximum.accumulate(times).tolist(), strict=True))
    wholes = {name: median(sum(s) + decoder for s, decoder in runs[name]) for name in runs}
    return CostTable(median(rest), table, median(dense_ms[1:]), wholes)
