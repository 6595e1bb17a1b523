"""Time one batch of images, decoder included: dense, dynamic, smaller and published samplers.

Each sampler runs in a process of its own, and those of one batch size take turns. The published one
runs from a checkout of its code (`benchmark.published`) with the same weights. It and ours draw in
its order, each from one generator of the same seed, so that images can be compared as well.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmoe_var.checkpoints.load import weights_file
from dmoe_var.config.root import Config
from dmoe_var.errors import CheckpointError, ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.figures.part_times import draw_part_times
from dmoe_var.metrics.flops import FlopReport
from dmoe_var.metrics.part_timing import median_by_part, median_by_scale
from dmoe_var.metrics.timing import Timing, time_in_turn
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.guidance import by_scale, text
from dmoe_var.models.head_skipping import HeadSkipping
from dmoe_var.models.int8 import check_int8
from dmoe_var.models.token_skipping import TokenSkipping
from dmoe_var.moe.experts.paths import path
from dmoe_var.moe.selection import RandomDensity, Selection, Threshold
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.stages.parts import loaded, skipping
from dmoe_var.stages.parts.kernels import run_kernels
from dmoe_var.stages.parts.loaded import EXPERTS, Models
from dmoe_var.stages.parts.skipped_means import let_means_stand
from dmoe_var.stages.parts.timed_samplers import Task, ours, published

NOTHING_SKIPPED: Any = {"skipping": TokenSkipping(), "heads": HeadSkipping()}
OURS, PLAIN, DRAFTER, PUBLISHED = "dense", "plain", "drafter", "published"
DEPTHS = ("var_d16", "var_d20", "var_d24", "var_d30")
"""Published models of 256 px, by rising depth."""


@dataclass(frozen=True)
class Case:
    """One sampler at one batch size. model: dense, plain (dense, sampled as published if `sampling`
    says otherwise), dynamic, random, drafter (alone, sampled as dense or plain), drafted (dense or
    dynamic after it), smaller or published."""

    name: str
    model: str
    tau: float | None
    task: Task
    flops: FlopReport

    @property
    def expert_share(self) -> float | None:
        """Density: the share of (token, expert) pairs at sparse scales that ran, or None."""
        pairs, experts = self.flops.pairs, self.flops.fixed.experts
        if not pairs:
            return None
        ran = sum(float(np.mean(of_scale)) for of_scale in pairs.values())
        return ran / sum(experts[si].num_pairs for si in pairs)

    def compiled(self) -> Case:
        return replace(self, name=f"{self.name}_compiled", task=replace(self.task, compiled=True))

    def row(self, timing: Timing) -> dict[str, Any]:
        """Make a row for figures, with times by part and scale if those were measured."""
        size = len(self.task.labels)
        times = {key.removeprefix("_"): value for key, value in timing.metrics("").items()}
        row: dict[str, Any] = {
            "name": self.name,
            "model": self.model,
            "tau": self.tau,
            "batch_size": size,
            "compiled": self.task.compiled,
            "device": torch.device(self.task.device).type,
            "dtype": self.task.sampling.dtype,
            **times,
            "runs_ms": list(timing.runs_ms),
            "images_per_s": 1000 * size / timing.percentile(50),
            "flops_gmac": self.flops.total_gmac,
            "expert_share": self.expert_share,
        }
        if timing.parts:
            whole = [parts.total_ms for parts in timing.parts]
            decoder = [parts.by_part_ms["decoder"] for parts in timing.parts]
            row |= {
                "by_part_ms": median_by_part(timing.parts),
                "by_scale_ms": median_by_scale(timing.parts),
                "with_clock_ms_median": float(np.median(whole)),
                "without_decoder_ms_median": float(np.median(np.subtract(whole, decoder))),
            }
        return row


def run(experiment: Experiment) -> StageResult:
    config, benchmark = experiment.config, experiment.config.benchmark
    if benchmark.kernels:
        selections = _selections(experiment) if benchmark.real_masks else []
        return run_kernels(experiment, {name: rules for name, _, rules in selections})
    # Check before timing
    sources = _sources(experiment)
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
        cases = {case.name: case for case in _cases(experiment, sources, size)}
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


def _sources(experiment: Experiment) -> dict[str, str]:
    """Find the weights of each model as a path that another process can open."""
    base, benchmark = experiment.config.base, experiment.config.benchmark
    found: dict[str, Path] = {}
    for kind, source in (("vqvae", base.vqvae), ("var", base.var)):
        if source is not None:
            found[kind] = weights_file(source, kind)
        elif benchmark.dynamic:
            found[kind] = loaded.checkpoint(experiment, f"train_{kind}")
        else:
            raise ConfigError("base.vqvae and base.var must both be given for the benchmark")
    if benchmark.dynamic:
        found["moe"] = loaded.checkpoint(experiment, experiment.whole.expert_stage)
    if experiment.config.drafter.var is not None:
        found["drafter"] = weights_file(experiment.config.drafter.var, "var")
    if benchmark.smaller is not None:
        found["smaller"] = weights_file(_smaller(experiment), "var")
    return {kind: str(path) for kind, path in found.items()}


def _smaller(experiment: Experiment) -> str:
    """Name the dense model of less depth. Raise ConfigError if "next" finds none below."""
    smaller, base = experiment.config.benchmark.smaller, experiment.config.base.var
    assert smaller is not None
    if smaller != "next":
        return smaller
    below = {deeper: depth for depth, deeper in pairwise(DEPTHS)}
    if base not in below:
        raise ConfigError(
            f"benchmark.smaller=next: base.var={base} has no published model below it; allowed: a "
            f"path or a name, or base.var one of {', '.join(below)}"
        )
    return below[base]


def _cases(experiment: Experiment, sources: Mapping[str, str], size: int) -> list[Case]:
    """List all that is timed at one batch size, the dense model first."""
    config, benchmark = experiment.config, experiment.config.benchmark
    task = Task(
        vqvae=sources["vqvae"],
        var=sources["var"],
        patch_nums=config.vqvae.patch_nums,
        labels=tuple(i % config.var.num_classes for i in range(size)),
        seed=config.evaluate.seed,
        device=str(experiment.device),
        sampling=config.sampling,
        published=benchmark.published or "",
    )
    dense = Case(OURS, "dense", None, task, task.flops())
    cases = [dense]
    if (plain := _plain(config)) is not None:
        whole = replace(task, sampling=plain)
        cases.append(Case(PLAIN, PLAIN, None, whole, whole.flops()))
    for name, tau, selection in _selections(experiment):
        dynamic = replace(
            task,
            moe=sources["moe"],
            moe_scales=config.moe.scales,
            selection=selection,
            impl=config.moe.impl,
        )
        dynamic = replace(dynamic, skipped=_means(experiment, dynamic))
        flops = dynamic.flops()
        cases.append(Case(f"dynamic_{name}", "dynamic", tau, dynamic, flops))
        if benchmark.random_masks:  # of the same density
            num_experts = config.var.hidden // config.split.expert_size
            rules = [RandomDensity(share * num_experts) for share in flops.expert_share.values()]
            chance = replace(dynamic, selection=rules)
            cases.append(Case(f"random_{name}", "random", tau, chance, chance.flops()))
    if config.drafter.var is not None:
        assert config.drafter.scales is not None
        cases += _drafted(cases, sources["drafter"], config.drafter.scales)
    if benchmark.smaller is not None:
        plain = replace(task.sampling, **NOTHING_SKIPPED)  # what fewer FLOPs buy without
        smaller = replace(task, var=sources["smaller"], sampling=plain)
        cases.append(Case("smaller", "smaller", None, smaller, smaller.flops()))
    if benchmark.compile == "both":
        cases += [case.compiled() for case in cases]
    elif benchmark.compile == "compiled":
        cases = [case.compiled() for case in cases]
    if benchmark.published is not None:
        cases.append(replace(dense, name=PUBLISHED, model="published"))
    return cases


def _plain(config: Config) -> SamplingConfig | None:
    """Sample as published: every token, in floats, guided at all scales by the strongest cfg, each
    operator started by itself. Return None if the dense model samples so anyway."""
    ours = config.sampling
    cfg_S = by_scale(ours.cfg, config.var.num_scales)
    plain = replace(ours, int8="none", cuda_graphs=False, **NOTHING_SKIPPED)
    if set(cfg_S[1:]) == {max(cfg_S)} and plain == ours:
        return None
    return replace(plain, cfg=max(cfg_S))


def _means(experiment: Experiment, dynamic: Task) -> SkippedMeans | None:
    """Get what stands for the experts that a sampler skips, on the CPU; None for nothing."""
    if experiment.config.moe.skipped == "zero":
        return None
    model, vqvae = dynamic.load(counted=True)  # as evaluate has them
    assert isinstance(model, DynamicVAR)
    let_means_stand(Models(experiment), experiment, model, vqvae, dynamic.selection)
    assert model.skipped is not None
    return model.skipped.cpu()


def _drafted(cases: Sequence[Case], source: str, scales: int) -> list[Case]:
    """List the drafter alone, sampled as the dense model is and as published, and after it the
    dense model and each dynamic one."""
    found = []
    for case in cases:
        if case.model in (OURS, PLAIN):
            alone = replace(case.task, var=source)
            name = DRAFTER if case.model == OURS else f"{PLAIN}_{DRAFTER}"
            found.append(Case(name, DRAFTER, None, alone, alone.flops()))
        if case.model in (OURS, "dynamic"):
            task = replace(case.task, drafter=source, drafted_scales=scales)
            found.append(Case(f"drafted_{case.name}", "drafted", case.tau, task, task.flops()))
    return found


def _selections(experiment: Experiment) -> list[tuple[str, float | None, Selection]]:
    """List name, tau on all sparse scales (None: the configured selection) and rules of each."""
    benchmark = experiment.config.benchmark
    chosen = [("chosen", None, experiment.config.selection.rules())] if benchmark.chosen else []
    return [*((f"tau{tau:g}", tau, Threshold(tau)) for tau in benchmark.tau), *chosen]


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
    check_int8(config.sampling.int8)
    if benchmark.published is not None:
        skipping.refuse(config, "the published sampler (benchmark.published) skips none")
    if benchmark.kernels:
        skipping.refuse(config, "benchmark.kernels=true times single layers on all tokens")
    if config.sampling.cuda_graphs:
        _refuse_without_graphs(config)
    if benchmark.compile != "eager":
        skipping.refuse(config, f"benchmark.compile={benchmark.compile} compiles plain blocks")


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
