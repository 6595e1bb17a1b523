"""The benchmark of expert paths by themselves: a layer's shapes, experts of several sizes."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from dmoe_var.errors import ConfigError
from dmoe_var.figures.kernels import draw_kernels
from dmoe_var.metrics.kernel_timing import Shape, measured_rates, time_kernels
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.work import Work

BRANCHES = 2
"""Rows of an image under guidance."""


def run_kernels(work: Work) -> StageResult:
    """Times a layer of the configured width at each of `moe.scales`; writes kernels.png."""
    benchmark, sampling, device = work.config.benchmark, work.config.sampling, work.device
    shapes = _shapes(work)
    rates = measured_rates(device, sampling.torch_dtype, benchmark.repeats)
    rows: list[dict[str, Any]] = []
    for shape in tqdm(shapes, desc="kernels", unit="shape", disable=not work.progress):
        rows += time_kernels(
            shape, benchmark.densities, rates, device, sampling.torch_dtype, benchmark.repeats
        )
    metrics = {
        "product_gflops_per_s": rates.gflops_per_s,
        "copy_gbytes_per_s": rates.gbytes_per_s,
    }
    for row in rows:
        density = "" if row["density"] is None else f"_d{row['density']:g}"
        name = f"{row['impl']}_e{row['expert_size']}_n{row['tokens']}{density}"
        metrics[f"{name}_ms_median"] = row["ms_median"]
        metrics[f"{name}_time_ratio"] = row["time_ratio"]
    draw_kernels(rows, work.folder("benchmark") / "kernels.png")
    return StageResult(metrics, 0, {"kernels": rows}, dtype=sampling.dtype)


def _shapes(work: Work) -> list[Shape]:
    """ConfigError for experts that do not divide the hidden width."""
    config, found = work.config, []
    branches = BRANCHES if config.sampling.cfg else 1
    for size in config.benchmark.expert_sizes:
        if config.var.hidden % size:
            raise ConfigError(
                f"benchmark.expert_sizes={size} must divide the hidden width {config.var.hidden}"
            )
        for batch in config.benchmark.sizes:
            for si in config.moe.scales:
                tokens = branches * batch * config.var.patch_nums[si] ** 2
                found.append(Shape(config.name, config.var.C, config.var.hidden, size, tokens))
    return found
