"""Run the tau sweep: dense baseline, tau grids and lists, every seed; figures 2a, 2b, 3 and 12.

A sweep may be cut into shards, each measured by a run of its own, at the same time or not. A run
without a shard finds the points that are there, measures what is missing, joins and plots.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from dmoe_var import markdown
from dmoe_var.config.root import Config
from dmoe_var.distributed import barrier, is_main
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import DEFAULT_VARIANT, Experiment
from dmoe_var.experiment.graph import run_stage
from dmoe_var.experiment.points import LABELS, Curve, Point, curves_of, joined, single, tau_curve
from dmoe_var.experiment.record import Record
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.figures import expert_maps, fid_over_flops, sample_grid
from dmoe_var.files import whole_file, write_text
from dmoe_var.models import guidance
from dmoe_var.moe.selection import SelectionConfig
from dmoe_var.sampling.draw import SAMPLES_FILE, Samples
from dmoe_var.stages import evaluate
from dmoe_var.stages.maps import collect_maps
from dmoe_var.stages.parts import skipping
from dmoe_var.stages.parts.loaded import drafter_keys, needs_experts
from dmoe_var.stages.parts.skipped_means import get_means

GRID_CLASSES = 10  # columns of samples.png, one per class
GRID_ROWS = 6  # its images per class
MAP_IMAGES = 4  # images of expert_maps.png at each tau
COLUMNS = ("inception_score_mean", "precision", "recall", "label_agreement")
"""Beginnings of the names of metrics that the table shows if they were measured."""

Setting = tuple[Curve, Point]
"""A point before its seeds, and the curve that it is on."""


def settings(experiment: Experiment) -> list[Setting]:
    """List all settings of a sweep, the dense baseline first. A tau list is a curve of its own."""
    sweep = experiment.config.sweep
    fixed = {"evaluate.model": "dynamic", "selection.rule": "threshold"}
    every = {"moe.scales": tuple(range(experiment.config.var.num_scales))}
    curves = [
        single(LABELS["dense"], "dense", "dense", {"evaluate.model": "dense"}),
        tau_curve(LABELS["last"], "last", sweep.last),
        tau_curve(LABELS["all"], "all", sweep.all, every),
    ]
    for name, taus in sweep.lists.items():
        method = "chosen" if name == sweep.chosen else "lists"
        curves.append(single(LABELS[method], method, name, {**fixed, "selection.tau": taus}))
    return [(curve, point) for curve in curves for point in curve.points]


def planned(experiment: Experiment) -> list[tuple[Setting, int]]:
    """List the points of this run, setting and seed: all, or every `parts`-th for a shard.

    The first shard has the dense model's first seed.
    """
    sweep = experiment.config.sweep
    points = [(setting, seed) for setting in settings(experiment) for seed in sweep.seeds]
    return points if sweep.part is None else points[sweep.part - 1 :: sweep.parts]


def run_part(experiment: Experiment) -> list[Record]:
    """Measure what is missing of the shard `sweep.part`; return the records of all its points.

    The sweep's own record is left to the joining run.
    """
    whole(experiment).check("sweep")
    return _measure(experiment, evaluate.Bench(experiment))


def whole(experiment: Experiment) -> Experiment:
    """Return the sweep that a shard belongs to, with the default `selection`, which its points do
    not take. A point's record is the same in both."""
    sweep = replace(experiment.config.sweep, part=None, parts=1)
    config = replace(experiment.whole, sweep=sweep, selection=SelectionConfig())
    return replace(experiment, whole=config)


def _measure(experiment: Experiment, bench: evaluate.Bench) -> list[Record]:
    """Measure what is missing of the planned points; return the records of all."""
    measured: list[Record] = []
    new: list[Experiment] = []

    def measure(each: Experiment) -> StageResult:
        new.append(each)
        return evaluate.run(each, bench)

    for (_, point), seed in tqdm(
        planned(experiment), desc="sweep", disable=not experiment.progress
    ):
        each = point.experiment(whole(experiment), seed)
        record = run_stage(each, "evaluate", measure)
        measured.append(record)
        if is_main() and each in new:  # its record is written, even if wandb fails
            tracked = each.tracking("evaluate")
            tracked.summarise(each.folder("evaluate"), record.metrics, each.relevant("evaluate"))
    return measured


def run(experiment: Experiment) -> StageResult:
    """Measure what is missing, join the records and plot them."""
    seeds = experiment.config.sweep.seeds
    bench = evaluate.Bench(experiment)
    records = _measure(experiment, bench)
    by_setting = [records[i : i + len(seeds)] for i in range(0, len(records), len(seeds))]
    rows = [
        _row(experiment, *setting, of_setting)
        for setting, of_setting in zip(settings(experiment), by_setting, strict=True)
    ]
    dense = rows[0]
    for row in rows:
        row["flops_saved"] = 1 - row["flops_gmac"] / dense["flops_gmac"]
        row["fid_change"] = row["fid_mean"] / dense["fid_mean"] - 1
    fid_name = records[0].about["fidelity"]
    get_means(bench, experiment, [taus.rules() for taus in _mapped(experiment).values()])
    if is_main():
        _draw(experiment, bench, rows, fid_name)
    barrier()
    about = {"settings": rows, "fidelity": fid_name, "seeds": list(seeds)}
    return StageResult(_headline(rows), experiment.config.evaluate.num_samples, about)


def _row(
    experiment: Experiment, curve: Curve, point: Point, records: list[Record]
) -> dict[str, Any]:
    """Make a row of the table from a setting and its records over the seeds."""
    dense = curve.method == "dense"
    scales = () if dense else point.changes.get("moe.scales", experiment.config.moe.scales)
    return {
        "group": curve.method,
        "label": point.label,
        "tau": list(point.changes.get("selection.tau", ())),
        "scales": list(scales),
        **joined(records),
    }


def _headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Collect the dense model's and the operating point's numbers, flat."""
    names = {"dense": "dense", "chosen": "operating_point"}
    keys = ("fid_mean", "fid_std", "flops_gmac", "flops_saved", "fid_change", *_columns(rows))
    return {
        f"{names[row['group']]}_{key}": row[key]
        for row in rows
        for key in keys
        if row["group"] in names
    }


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Find the metrics beside FLOPs and FID that the table shows."""
    return [key for start in COLUMNS for key in rows[0] if key.startswith(start)]


def _draw(
    experiment: Experiment, bench: evaluate.Bench, rows: list[dict[str, Any]], fid_name: str
) -> None:
    folder, config = experiment.folder("sweep"), experiment.config
    title = (
        f"{config.name}: {config.evaluate.num_samples} images a point, "
        f"{len(config.sweep.seeds)} seed(s), cfg {guidance.text(config.sampling.cfg)}"
        f"{', means of skipped experts' if config.moe.skipped == 'mean' else ''}"
    )
    fid_over_flops.draw(curves_of(rows), fid_name, title, "", folder / "fid_over_flops.png")
    write_text(folder / "table.md", table(rows, fid_name) + "\n")
    seed, found = config.sweep.seeds[0], settings(experiment)
    dense = found[0][1].experiment(whole(experiment), seed)
    chosen = next((point for curve, point in found if curve.method == "chosen"), None)
    _publish_samples(experiment, dense, "dense")
    if chosen is None:
        return
    dynamic, tau = chosen.experiment(whole(experiment), seed), chosen.changes["selection.tau"]
    _publish_samples(experiment, dynamic, "operating_point")
    panels = {
        f"dense VAR, seed {seed}": _first_images(dense),
        f"DMoE-VAR, tau {', '.join(f'{t:g}' for t in tau)}": _first_images(dynamic),
    }
    sample_grid.draw(panels, min(GRID_CLASSES, config.var.num_classes), folder / "samples.png")
    labels = list(range(min(MAP_IMAGES, config.var.num_classes)))
    by_tau = {
        name: collect_maps(experiment, bench, labels, taus.rules(), seed)
        for name, taus in _mapped(experiment).items()
    }
    expert_maps.draw(by_tau, list(config.moe.scales), folder / "expert_maps.png")


def _mapped(experiment: Experiment) -> dict[str, SelectionConfig]:
    """List the selections whose maps are plotted, by name; none without an operating point."""
    sweep = experiment.config.sweep
    if sweep.chosen is None:
        return {}
    tau = sweep.lists[sweep.chosen]
    twice = tuple(min(1.0, 2 * value) for value in tau)
    shown = {"tau 0": (0.0,), "chosen tau": tau, "twice that": twice}
    return {name: SelectionConfig(tau=taus) for name, taus in shown.items()}


def _first_images(point_experiment: Experiment) -> np.ndarray:
    images = Samples.load(point_experiment.folder("evaluate") / SAMPLES_FILE).images
    classes = min(GRID_CLASSES, point_experiment.config.var.num_classes)
    return images[: classes * GRID_ROWS]


def _publish_samples(experiment: Experiment, point_experiment: Experiment, name: str) -> None:
    """Copy a point's samples.npz and record to runs/<experiment>/<name>/, or into the sweep's own
    folder if the sweep is a variant."""
    own = experiment.variant("sweep") == DEFAULT_VARIANT
    target = (experiment.root if own else experiment.folder("sweep")) / name
    target.mkdir(parents=True, exist_ok=True)
    for file in (SAMPLES_FILE, "result.json"):
        with whole_file(target / file) as temporary:
            shutil.copyfile(point_experiment.folder("evaluate") / file, temporary)


def table(rows: list[dict[str, Any]], fid_name: str) -> str:
    """Format the sweep as a Markdown table. A single seed has no spread."""
    columns = _columns(rows)
    titles = [column.removesuffix("_mean").replace("_", " ") for column in columns]
    fid = fid_over_flops.display_name(fid_name)
    heads = ["setting", "tau", "GMAC", "saved", fid, "against dense", *titles]
    lines = []
    for row in rows:
        tau = ", ".join(f"{value:g}" for value in row["tau"]) or "-"
        names = {"last": "last scales", "all": "all scales", "lists": row["label"]}
        name = names.get(row["group"], row["group"])
        name = f"**{row['label']}** (operating point)" if row["group"] == "chosen" else name
        scores = [
            f"{row[key]:.2f}" if key.startswith("inception_score") else f"{row[key]:.1%}"
            for key in columns
        ]
        lines.append([
            name,
            tau,
            f"{row['flops_gmac']:.4f}",
            f"{row['flops_saved']:.1%}",
            f"{row['fid_mean']:.3f}" + (f" ± {row['fid_std']:.3f}" if row["fid_std"] else ""),
            f"{row['fid_change']:+.2%}",
            *scores,
        ])  # fmt: skip
    return markdown.table(heads, lines)


def table_of(record: Record) -> str:
    """Format the table of a sweep's record."""
    return table(record.about["settings"], record.about["fidelity"])


def refuse(config: Config) -> None:
    """Raise ConfigError for what a point or a sweep cannot do with the configuration."""
    evaluate.refuse(config)
    evaluate.refuse_given_samples(config)
    skipping.refuse_router(config, "a sweep")
    if config.sweep.part is not None:
        raise ConfigError(
            f"sweep.part={config.sweep.part}: a part of a sweep is measured by scripts/sweep.py; "
            "allowed here: null, which joins all parts"
        )
    if config.evaluate.format == "png":
        raise ConfigError(
            "evaluate.format=png: a sweep's figures are drawn from samples.npz; allowed: npz, both"
        )
    allowed = sorted({1, len(config.moe.scales)})
    for name, taus in config.sweep.lists.items():
        if len(taus) not in allowed:
            raise ConfigError(
                f"sweep.lists.{name}={list(taus)} must have {' or '.join(map(str, allowed))} "
                "values, one for all or one for each of moe.scales"
            )


def reads(config: Config, ours: Config) -> Keys:
    measuring = ("sampling", "evaluate.num_samples", "evaluate.format", "fidelity", "sweep")
    return ("moe", *drafter_keys(config), *measuring)


STAGE = Stage(
    "sweep",
    run,
    reads,
    needs=lambda config: (*needs_experts(config), *evaluate.needs_classifier(config)),
    refuse=refuse,
    compares=True,
)
