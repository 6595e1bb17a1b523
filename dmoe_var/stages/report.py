"""Write one HTML page of all that was measured, with the routers under a microscope."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from dmoe_var.config.root import Config
from dmoe_var.data.class_names import class_names, title
from dmoe_var.data.images import to_uint8
from dmoe_var.distributed import from_main, is_main
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import operating_point, vary
from dmoe_var.experiment.record import git_commit, now
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.files import write_text
from dmoe_var.metrics.flops import GIGA, SAMPLER_PARTS, report
from dmoe_var.metrics.flops_fixed import FixedCost, fixed_cost
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.var import VAR
from dmoe_var.moe.counts import ExpertCounts, ExpertHistogram
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.selection import SelectionRule, Threshold
from dmoe_var.moe.tau_schedule import by_scale
from dmoe_var.report import microscope, page
from dmoe_var.report.pictures import png_uri
from dmoe_var.report.records import Curves, stages
from dmoe_var.sampling.sampler import generate
from dmoe_var.stages.evaluate import Bench, needs_classifier, refuse_given_samples
from dmoe_var.stages.parts import skipping
from dmoe_var.stages.parts.loaded import EXPERTS, needs_experts, refuse_drafter, refuse_int8
from dmoe_var.stages.parts.skipped_means import get_means, let_means_stand

REPORT_FILE = "report.html"
MB = 1e6
PICTURES = 4
"""Pictures under the microscope if no classes are given."""


def run(experiment: Experiment) -> StageResult:
    """Write report.html. The main process samples its few pictures."""
    bench = Bench(experiment)
    get_means(bench, experiment, map(Threshold, experiment.config.report.tau))
    return from_main(_write(experiment, bench) if is_main() else StageResult({}))


def _write(experiment: Experiment, bench: Bench) -> StageResult:
    config = experiment.config
    data: dict[str, Any] = {"about": _about(config), "stages": stages(experiment)}
    data["quality"] = Curves(experiment).shown()
    without = len(json.dumps(data))
    if without > config.report.max_mb * MB:
        raise ConfigError(
            f"report.max_mb={config.report.max_mb:g}: the page takes {without / MB:.1f} MB without "
            "its microscope; allow more, or lower report.grid_images or report.grid_side"
        )
    data["microscope"] = _microscope(experiment, bench, config.report.max_mb * MB - without)
    text = page.build(f"DMoE-VAR: {config.name}", data)
    write_text(experiment.folder("report") / REPORT_FILE, text)
    pictures = len(data["microscope"]["pictures"])
    points = sum(len(curve["rows"]) for curve in data["quality"]["curves"])
    metrics = {
        "page_mb": len(text.encode()) / MB,
        "points": float(points),
        "microscope_pictures": float(pictures),
    }
    lacking = ("missing", "made otherwise")
    missing = [row["name"] for row in data["stages"] if row["state"] in lacking]
    about = {"page": REPORT_FILE, "missing": missing}
    return StageResult(metrics, pictures, about, config.report.seed, config.sampling.dtype)


def _about(config: Config) -> dict[str, Any]:
    return {
        "name": config.name,
        "made": now(),
        "commit": git_commit(),
        "patch_nums": list(config.var.patch_nums),
        "moe_scales": list(config.moe.scales),
        "num_experts": config.var.hidden // config.split.expert_size,
        "expert_size": config.split.expert_size,
        "depth": config.var.depth,
        "width": config.var.C,
        "cfg": config.sampling.cfg,
        "image_size": config.data.image_size,
    }


def _microscope(experiment: Experiment, bench: Bench, budget: float) -> dict[str, Any]:
    """Record costs and, in order, as many of the pictures as fit into `budget` bytes."""
    config = experiment.config
    model = DynamicVAR(bench.dense, bench.experts, config.moe.scales)
    let_means_stand(bench, experiment, model, bench.vqvae, Threshold(config.report.tau[0]))
    fixed = fixed_cost(model, bench.vqvae, **config.sampling.counted)
    names = class_names(config.data, config.var.num_classes)
    experts = config.var.hidden // config.split.expert_size
    tokens = sum(fixed.branches[si] * config.var.patch_nums[si] ** 2 for si in config.moe.scales)
    each = microscope.num_bytes(config.var.depth, tokens, experts)
    content: dict[str, Any] = {
        **costs(fixed, fixed_cost(bench.dense, bench.vqvae, config.sampling.cfg)),
        "chosen": _chosen_tau(experiment),
        "tau": list(config.report.tau),
        "pictures": [],
        "picture_mb": each / MB,
        "max_mb": config.report.max_mb,
    }
    labels = config.report.labels or range(min(PICTURES, config.var.num_classes))
    for index, label in enumerate(tqdm(labels, "microscope", disable=not experiment.progress)):
        if each > budget:
            break
        shown = _picture(experiment, bench, model, fixed, index, label)
        shown["name"] = title(names, label)
        budget -= len(json.dumps(shown))
        if budget < 0:
            break
        content["pictures"].append(shown)
    content["left_out"] = len(labels) - len(content["pictures"])
    return content


def costs(fixed: FixedCost, dense: FixedCost) -> dict[str, Any]:
    """Count GMAC of an image without its experts, of a (token, expert) pair by sparse scale, and of
    the dense model's image. The sampler's parts count, the decoder does not. Means of skipped
    experts cost the same whatever runs."""
    always, everything = (
        sum(sum(cost.macs[part]) for part in SAMPLER_PARTS if part in cost.macs)
        for cost in (fixed, dense)
    )
    routers = sum(cost.router_macs + cost.skipped_macs for cost in fixed.experts.values())
    return {
        "branches": max(fixed.branches[si] for si in fixed.experts),
        "fixed_gmac": (always + routers) / GIGA,
        "pair_gmac": {str(si): cost.pair_macs / GIGA for si, cost in fixed.experts.items()},
        "dense_gmac": everything / GIGA,
    }


def _chosen_tau(experiment: Experiment) -> list[float]:
    """Find the operating point's tau, one per sparse scale (the median if each layer has one)."""
    config = vary(experiment, operating_point(experiment)).config
    selection, scales = config.selection, (config.var.num_scales, config.moe.scales)
    by_layer = [median(taus) for taus in selection.layer_tau]
    return by_scale("selection.tau", by_layer or selection.tau, *scales)


def _picture(
    experiment: Experiment,
    bench: Bench,
    model: DynamicVAR,
    fixed: FixedCost,
    index: int,
    label: int,
) -> dict[str, Any]:
    """Sample one picture, from the dense model and at each tau, and record what the routers did."""
    config, given = experiment.config, experiment.config.report
    recording = microscope.record(
        model, bench.vqvae, label, given.seed, index, config.sampling, config.moe.impl
    )
    dense = _draw(experiment, bench, bench.dense, index, label)
    drawn = []
    for tau in given.tau:
        rule, counts = Threshold(tau), ExpertCounts()
        let_means_stand(bench, experiment, model, bench.vqvae, rule)
        image = _draw(experiment, bench, model, index, label, rule, counts)
        rules = dict.fromkeys(config.moe.scales, rule)
        cost = report(fixed, ExpertHistogram.of(counts, rules, 1), rules)
        drawn.append({
            "tau": tau,
            "gmac": cost.total_gmac,
            "shares": [cost.expert_share[si] for si in config.moe.scales],
            "difference": float(np.abs(image.astype(int) - dense).mean()),
            "image": png_uri(image, given.picture_side),
        })  # fmt: skip
    return {
        "label": label,
        "seed": given.seed,
        "index": index,
        "dense": png_uri(dense, given.picture_side),
        "drawn": drawn,
        **page.packed(recording, given.picture_side),
    }


def _draw(
    experiment: Experiment,
    bench: Bench,
    model: VAR | DynamicVAR,
    index: int,
    label: int,
    rule: SelectionRule | None = None,
    observer: Observer | None = None,
) -> np.ndarray:
    """Sample a picture, uint8 (R, R, 3)."""
    config = experiment.config
    image_13RR = generate(
        model, bench.vqvae, [label], **config.sampling.options, seed=config.report.seed,
        selection=rule, start_index=index, impl=config.moe.impl, observer=observer,
    )  # fmt: skip
    return to_uint8(image_13RR)[0]


def refuse(config: Config) -> None:
    """Raise ConfigError for samples or sampling that a report does not tell of."""
    refuse_given_samples(config)
    skipping.refuse(config, "the report shows what routers did for every token, on all heads")
    refuse_drafter(config, "the page tells of models without one")
    refuse_int8(config, "the page tells of models in floats")


STAGE = Stage(
    "report",
    run,
    reads=(
        *EXPERTS, "sampling", "evaluate.num_samples", "evaluate.format", "fidelity", "sweep",
        "report",
    ),
    needs=lambda config: (*needs_experts(config), *needs_classifier(config)),
    refuse=refuse,
    always_runs=True,
)  # fmt: skip
