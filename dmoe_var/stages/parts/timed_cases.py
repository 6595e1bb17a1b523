"""List the samplers that a benchmark times, and the models that they need: dense, dynamic, drafted,
smaller and published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmoe_var.checkpoints.load import weights_file
from dmoe_var.config.root import Config
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.contents import naming
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.metrics.flops import FlopReport
from dmoe_var.metrics.part_timing import median_by_part, median_by_scale
from dmoe_var.metrics.timing import Timing
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.guidance import by_scale
from dmoe_var.models.head_skipping import HeadSkipping
from dmoe_var.models.token_skipping import TokenSkipping
from dmoe_var.moe.selection import RandomDensity, Selection, Threshold
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import Models
from dmoe_var.stages.parts.skipped_means import let_means_stand
from dmoe_var.stages.parts.timed_samplers import Task

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


def sources_of(experiment: Experiment) -> dict[str, str]:
    """Find the weights of each model as a path that another process can open."""
    base, benchmark = experiment.config.base, experiment.config.benchmark
    found: dict[str, Path] = {}
    for kind, source in (("vqvae", base.vqvae), ("var", base.var)):
        if source is not None:
            found[kind] = _file(f"base.{kind}", source, kind)
        elif benchmark.dynamic:
            found[kind] = loaded.checkpoint(experiment, f"train_{kind}")
        else:
            raise ConfigError("base.vqvae and base.var must both be given for the benchmark")
    if benchmark.dynamic:
        found["moe"] = loaded.checkpoint(experiment, experiment.whole.expert_stage)
    if experiment.config.drafter.var is not None:
        found["drafter"] = _file("drafter.var", experiment.config.drafter.var, "var")
    if benchmark.smaller is not None:
        found["smaller"] = _file("benchmark.smaller", _smaller(experiment), "var")
    return {kind: str(path) for kind, path in found.items()}


def _file(key: str, source: str, kind: str) -> Path:
    with naming(key, source):
        return weights_file(source, kind)


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


def cases_of(experiment: Experiment, sources: Mapping[str, str], size: int) -> list[Case]:
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
    if (plain := as_published(config)) is not None:
        whole = replace(task, sampling=plain)
        cases.append(Case(PLAIN, PLAIN, None, whole, whole.flops()))
    for name, tau, selection in selections_of(experiment):
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


def as_published(config: Config) -> SamplingConfig | None:
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


def selections_of(experiment: Experiment) -> list[tuple[str, float | None, Selection]]:
    """List name, tau on all sparse scales (None: the configured selection) and rules of each."""
    benchmark = experiment.config.benchmark
    chosen = [("chosen", None, experiment.config.selection.rules())] if benchmark.chosen else []
    return [*((f"tau{tau:g}", tau, Threshold(tau)) for tau in benchmark.tau), *chosen]
