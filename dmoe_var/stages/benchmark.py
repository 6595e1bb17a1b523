"""Time one batch of images, decoder included: dense, dynamic, smaller and published samplers.

Each sampler runs in a process of its own, and those of one batch size take turns. The published one
runs from a checkout of its code (`benchmark.published`) with the same weights. It and ours draw in
its order, each from one generator of the same seed, so that images can be compared as well.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmoe_var.config.root import Config
from dmoe_var.errors import CheckpointError, ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.figures.part_times import draw_part_times
from dmoe_var.metrics.timing import Timing, time_in_turn
from dmoe_var.metrics.triton_prediction import check_predictable
from dmoe_var.models.guidance import text
from dmoe_var.moe.experts.paths import path
from dmoe_var.stages.parts import loaded, skipping
from dmoe_var.stages.parts.kernels import run_kernels
from dmoe_var.stages.parts.loaded import EXPERTS
from dmoe_var.stages.parts.on_device import check_sampling
from dmoe_var.stages.parts.timed_cases import (
    DRAFTER,
    OURS,
    PLAIN,
    PUBLISHED,
    cases_of,
    selections_of,
    sources_of,
)
from dmoe_var.stages.parts.timed_samplers import ours, published


def run(experiment: Experiment) -> StageResult:
    config, benchmark = experiment.config, experiment.config.benchmark
    if benchmark.kernels:
        selections = selections_of(experiment) if benchmark.real_masks else []
        return run_kernels(experiment, {name: rules for name, _, rules in selections})
    # Check before timing
    sources = sources_of(experiment)
    if benchmark.published is not None:
        _check_published(benchmark.published, sources)
        if config.sampling.temperature is not None:
            raise ConfigError(
                f"sampling.temperature={config.sampling.temperature}: the published sampler has "
                "none; allowed: null, or leave benchmark.published out"
            )
        if not isinstance(config.sampling.cfg, float):
            raise ConfigError(
                f"sampling.cfg={text(config.sampling.cfg)}: the published sampler takes one value; "
                "leave benchmark.published out"
            )
    _check_compiler(experiment)
    loaded.vqvae(experiment)  # checks all against the configuration
    loaded.dense(experiment)
    if benchmark.dynamic:
        loaded.split(experiment)
    if config.drafter.var is not None:
        loaded.drafter(experiment)
        if benchmark.dynamic:
            loaded.check_drafter(config)
    # Time each size
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    runs_ms: dict[str, tuple[float, ...]] = {}
    for size in benchmark.sizes:
        cases = {case.name: case for case in cases_of(experiment, sources, size)}
        timings = time_in_turn(
            {n: (published if n == PUBLISHED else ours, (c.task,)) for n, c in cases.items()},
            experiment.device,
            torch.get_num_threads(),
            benchmark.repeats,
            benchmark.warmup,
            experiment.progress,
            [name for name in cases if name != PUBLISHED] if benchmark.parts else (),
        )
        suffix = f"_b{size}" if benchmark.batch_sizes else ""
        metrics |= _metrics(timings, suffix)
        rows += [cases[name].row(timing) for name, timing in timings.items()]
        runs_ms |= {f"{name}{suffix}": timing.runs_ms for name, timing in timings.items()}
    if benchmark.parts:
        draw_part_times(rows, experiment.folder("benchmark") / "part_times.png")
    sizes: dict[str, Any] = {"batch_size": benchmark.batch_size}
    if benchmark.batch_sizes:
        sizes = {"batch_sizes": list(benchmark.sizes)}
    about = {"runs_ms": runs_ms, "timings": rows, **sizes}
    return StageResult(metrics, sum(benchmark.sizes), about, dtype=config.sampling.dtype)


def _metrics(timings: Mapping[str, Timing], suffix: str) -> dict[str, float]:
    """Collect one batch size's metrics, flat. NAME_time_ratio compares with the dense model, or a
    compiled model with the compiled dense one; p10 and p90 are over the rounds. NAME_plain_ratio
    compares with the dense model that samples as published, NAME_drafter_ratio with the drafter
    alone that does. time_ratio compares the dense model, compiled if it ran only so, with the
    published sampler."""
    metrics: dict[str, float] = {}
    compiled = timings.get(f"{OURS}_compiled")
    mine = timings.get(OURS, compiled)
    for name, timing in timings.items():
        metrics |= timing.metrics(f"{name}{suffix}")
        alike = compiled if name.endswith("_compiled") else mine
        if alike is not None and timing is not alike and name != PUBLISHED:
            metrics |= _ratio(timing, alike, f"{name}{suffix}_")
        end = "_compiled" if name.endswith("_compiled") else ""
        drafters = (f"{PLAIN}_{DRAFTER}{end}", f"{DRAFTER}{end}")
        for called, others in (("plain_ratio", (f"{PLAIN}{end}",)), ("drafter_ratio", drafters)):
            other = next((timings[each] for each in others if each in timings), None)
            if other is not None and timing is not other and name != PUBLISHED:
                metrics |= _ratio(timing, other, f"{name}{suffix}_", called=called)
    if mine is not None and PUBLISHED in timings:
        theirs = timings[PUBLISHED]
        metrics |= _ratio(mine, theirs, "", suffix)
        metrics[f"memory_ratio{suffix}"] = mine.peak_memory_bytes / theirs.peak_memory_bytes
        difference = float(np.abs(mine.output - theirs.output).max())
        metrics[f"images_max_abs_difference{suffix}"] = difference
    return metrics


def _ratio(
    timing: Timing, other: Timing, prefix: str, suffix: str = "", called: str = "time_ratio"
) -> dict[str, float]:
    """Divide the medians, and give the spread of the ratio over rounds."""
    name = f"{prefix}{called}{suffix}"
    p10, p90 = np.percentile(np.array(timing.runs_ms) / np.array(other.runs_ms), [10, 90])
    median = timing.percentile(50) / other.percentile(50)
    return {name: median, f"{name}_p10": float(p10), f"{name}_p90": float(p90)}


def _check_compiler(experiment: Experiment) -> None:
    """Raise ConfigError if torch.compile has no compiler for a CPU's code."""
    asked = experiment.config.benchmark.compile
    if asked == "eager" or experiment.device.type != "cpu":
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"benchmark.compile={asked}: needs a C++ compiler, {compiler} is not there (CXX names "
            "another); allowed here: eager"
        )


def _check_published(folder: str, sources: Mapping[str, str]) -> None:
    if not (Path(folder) / "models" / "var.py").is_file():
        raise ConfigError(f"benchmark.published={folder}: no checkout of the published code there")
    for kind in ("vqvae", "var"):
        if not sources[kind].endswith(".pth"):
            raise CheckpointError(
                f"base.{kind}={sources[kind]}: the published code reads .pth files alone"
            )


def reads(config: Config, ours: Config) -> Keys:
    """Declare what is timed. Random weights come from no file; a dense model runs no expert."""
    benchmark = config.benchmark
    if benchmark.kernels and not benchmark.real_masks:
        return ("var", "moe", "sampling", "benchmark")
    experts = EXPERTS if benchmark.chosen else ("moe",)
    base = ("vqvae", "base.vqvae", "var", "base.var", "sampling", "evaluate.seed", "benchmark")
    return (*base, *loaded.drafter_keys(config), *(experts if benchmark.dynamic else ()))


def needs(config: Config) -> Keys:
    return (config.expert_stage,) if config.benchmark.dynamic else ()


def refuse(config: Config) -> None:
    """Raise ConfigError for what cannot be timed: means by themselves, and some skipping."""
    benchmark = config.benchmark
    if benchmark.kernels and config.moe.skipped == "mean":
        raise ConfigError(
            "moe.skipped=mean: benchmark.kernels=true times experts alone; allowed: zero"
        )
    skipping.refuse_router(config, "a benchmark")
    if benchmark.compile != "eager" or benchmark.kernels:
        loaded.refuse_int8(config, "compiled models and single layers are timed in floats")
    if benchmark.published is not None:
        skipping.refuse(config, "the published sampler (benchmark.published) skips none")
    if benchmark.kernels:
        skipping.refuse(config, "benchmark.kernels=true times single layers on all tokens")
    if benchmark.predict:
        check_predictable(config.sampling.dtype)
    if config.sampling.cuda_graphs:
        _refuse_without_graphs(config)
    if benchmark.compile != "eager":
        skipping.refuse(config, f"benchmark.compile={benchmark.compile} compiles plain blocks")
    check_sampling(config, benchmark.dynamic)


def _refuse_without_graphs(config: Config) -> None:
    """Raise ConfigError for what would run without the graphs that are asked for."""
    heads = list(config.sampling.heads.ratios)
    for key, value, fits, allowed in (
        ("sampling.heads.ratios", heads, not any(heads), "[]"),
        ("moe.impl", config.moe.impl, not path(config.moe.impl).waits, "auto, reference, triton"),
        (
            "benchmark.compile",
            config.benchmark.compile,
            config.benchmark.compile == "eager",
            "eager",
        ),
    ):
        if not fits:
            raise ConfigError(
                f"{key}={value}: no CUDA graph holds that, but sampling.cuda_graphs=true; allowed "
                f"with it: {allowed}"
            )


STAGE = Stage("benchmark", run, reads, needs, one_process=True, always_runs=True, refuse=refuse)
