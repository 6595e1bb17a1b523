"""Time of one batch of images, decoder included: ours, and the published sampler beside it.

The published sampler is run from a checkout of its code (`benchmark.published`), with the same
weights and one generator of the same seed, so that its images can be compared as well.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmoe_var.checkpoints import load_var, load_vqvae
from dmoe_var.checkpoints.load import weights_file
from dmoe_var.errors import CheckpointError, ConfigError
from dmoe_var.metrics.timing import Call, time_in_turn
from dmoe_var.sampling.memory import keep_freed_memory
from dmoe_var.sampling.sampler import SamplingConfig, generate
from dmoe_var.stages import models
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.work import Work

OURS, PUBLISHED = "dense", "published"


@dataclass(frozen=True)
class Task:
    """What a process needs to build its sampler."""

    vqvae: str
    var: str
    patch_nums: tuple[int, ...]
    labels: tuple[int, ...]
    seed: int
    device: str
    sampling: SamplingConfig
    published: str = ""


def ours(task: Task) -> Call:
    """Our dense sampler, drawing in the published order."""
    keep_freed_memory()
    dtype = task.sampling.torch_dtype
    vqvae = load_vqvae(task.vqvae, task.patch_nums).to(task.device, dtype)
    var = load_var(task.var, vqvae).to(task.device, dtype)
    options = {"cfg": task.sampling.cfg, "top_k": task.sampling.top_k, "top_p": task.sampling.top_p}

    def call() -> Tensor:
        generator = torch.Generator(task.device).manual_seed(task.seed)
        return generate(var, vqvae, list(task.labels), generator=generator, **options)  # type: ignore[arg-type]

    return call


def published(task: Task) -> Call:
    """The published sampler from its checkout; bfloat16 as its authors run it, under autocast."""
    sys.path.insert(0, task.published)
    from models import build_vae_var  # type: ignore[import-not-found]

    shape = load_var(task.var).config
    vqvae, var = build_vae_var(
        device=task.device,
        patch_nums=task.patch_nums,
        depth=shape.depth,
        shared_aln=shape.shared_adaln,
        num_classes=shape.num_classes,
    )
    for model, file in ((vqvae, task.vqvae), (var, task.var)):
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        model.eval().requires_grad_(False)
    half = task.sampling.dtype != "float32"
    labels_B = torch.tensor(task.labels, device=task.device)

    def call() -> Tensor:
        cast: Any = nullcontext()
        if half:
            cast = torch.autocast(torch.device(task.device).type, torch.bfloat16)
        with torch.inference_mode(), cast:
            images: Tensor = var.autoregressive_infer_cfg(
                B=len(labels_B),
                label_B=labels_B,
                g_seed=task.seed,
                cfg=task.sampling.cfg,
                top_k=task.sampling.top_k,
                top_p=task.sampling.top_p,
            )
        return images

    return call


def run(work: Work) -> StageResult:
    config, benchmark = work.config, work.config.benchmark
    files = {
        kind: weights_file(source, kind)
        for kind, source in (("vqvae", config.base.vqvae), ("var", config.base.var))
        if source is not None
    }
    if len(files) < 2:
        raise ConfigError("base.vqvae and base.var must both be given for the benchmark")
    task = Task(
        vqvae=str(_openable(files["vqvae"])),
        var=str(_openable(files["var"])),
        patch_nums=config.vqvae.patch_nums,
        labels=tuple(i % config.var.num_classes for i in range(benchmark.batch_size)),
        seed=config.evaluate.seed,
        device=str(work.device),
        sampling=config.sampling,
        published=benchmark.published or "",
    )
    builders: dict[str, Any] = {OURS: (ours, (task,))}
    if benchmark.published is not None:
        _check_published(benchmark.published, files)
        builders[PUBLISHED] = (published, (task,))
    models.vqvae(work)  # checks both against the configuration
    models.dense(work)
    threads = torch.get_num_threads()
    timings = time_in_turn(
        builders, work.device, threads, benchmark.repeats, benchmark.warmup, work.progress
    )
    metrics: dict[str, float] = {}
    for name, timing in timings.items():
        metrics |= timing.metrics(name)
    if PUBLISHED in timings:
        mine, theirs = timings[OURS], timings[PUBLISHED]
        pairs = np.array(mine.runs_ms) / np.array(theirs.runs_ms)
        metrics["time_ratio"] = mine.percentile(50) / theirs.percentile(50)
        metrics["time_ratio_p10"], metrics["time_ratio_p90"] = np.percentile(pairs, [10, 90])
        metrics["memory_ratio"] = mine.peak_memory_bytes / theirs.peak_memory_bytes
        metrics["images_max_abs_difference"] = float(np.abs(mine.output - theirs.output).max())
    runs_ms = {name: timing.runs_ms for name, timing in timings.items()}
    about = {"batch_size": benchmark.batch_size, "runs_ms": runs_ms}
    return StageResult(metrics, benchmark.batch_size, about, dtype=config.sampling.dtype)


def _openable(path: Path) -> Path:
    """The folder of a checkpoint of ours, or a .pth file."""
    return path.parent if path.suffix == ".safetensors" else path


def _check_published(folder: str, files: dict[str, Path]) -> None:
    if not (Path(folder) / "models" / "var.py").is_file():
        raise ConfigError(f"benchmark.published={folder}: no checkout of the published code there")
    for kind, path in files.items():
        if path.suffix != ".pth":
            raise CheckpointError(f"base.{kind}={path}: the published code reads .pth files alone")
