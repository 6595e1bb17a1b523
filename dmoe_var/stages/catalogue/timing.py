"""Make figures of time: throughput by scale (8b), time over tau (9)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import operating_point
from dmoe_var.figures import times
from dmoe_var.figures.style import Paths
from dmoe_var.stages.catalogue.figure import (
    Data,
    Figure,
    StageRun,
    figure,
    fitting_sizes,
    heading,
    shades,
)


@figure("8b")
def throughput(experiment: Experiment) -> Figure:
    """Make figure 8b: images per second through each scale, at the operating point."""
    changes = {**_timing(experiment, ()), **operating_point(experiment)}
    changes |= {"benchmark.parts": True, "benchmark.chosen": True}
    return Figure(
        "throughput by scale",
        draw_throughput,
        runs=[StageRun("chosen tau", "benchmark", changes, method="chosen")],
        of_runs=partial(_timings, shown="medians"),
    )


@figure("9")
def over_tau(experiment: Experiment) -> Figure:
    """Make figure 9: the time of a batch over tau, for each size of experts."""
    figures, sizes = experiment.config.figures, fitting_sizes(experiment)
    changes = _timing(experiment, figures.along(figures.time_tau))
    runs = [
        StageRun(f"experts of {size}", "benchmark", {**changes, "split.expert_size": size}, shade)
        for size, shade in zip(sizes, shades(sizes), strict=True)
    ]
    return Figure(
        "time over tau, by expert size",
        draw_over_tau,
        runs=runs,
        of_runs=partial(_timings, shown="bars: p10 to p90"),
    )


def _timing(experiment: Experiment, tau: Sequence[float]) -> dict[str, Any]:
    return {
        "benchmark.batch_sizes": (experiment.config.figures.batch_size,),
        "benchmark.tau": tuple(tau),
        "benchmark.published": None,
        "benchmark.compile": "eager",
        "benchmark.chosen": False,
        "benchmark.random_masks": False,
        "benchmark.smaller": None,
    }


def _timings(experiment: Experiment, runs: Sequence[StageRun], shown: str) -> Data:
    """Collect the rows of each benchmark, and note where they were timed."""
    timings: list[Data] = []
    for run in runs:
        record = run.record(experiment)
        timings.append({
            "name": run.name,
            "method": run.method,
            "shade": run.shade,
            "record": run.place(experiment),
            "device": record.device,
            "threads": record.threads,
            "rows": record.about["timings"],
        })  # fmt: skip
    batch = timings[0]["rows"][0]["batch_size"]
    where = dict.fromkeys(f"{each['device']}, {each['threads']} threads" for each in timings)
    return {"timings": timings, "note": f"batch {batch}, {' and '.join(where)}; {shown}"}


def draw_throughput(experiment: Experiment, data: Data, paths: Paths) -> None:
    """Plot the models as they are, not compiled."""
    (timing,) = data["timings"]
    names = {"dense": ("dense VAR", "dense"), "dynamic": ("DMoE-VAR, chosen tau", "chosen")}
    bars = []
    for row in timing["rows"]:
        if row["model"] in names and not row["compiled"]:
            label, method = names[row["model"]]
            seconds = [ms / 1000 for ms in row["by_scale_ms"]]
            rates = [row["batch_size"] / s for s in seconds]
            bars.append({"name": label, "method": method, "shade": None, "images_per_s": rates})
    times.draw_throughput(bars, heading(data), data["note"], paths)


def draw_over_tau(experiment: Experiment, data: Data, paths: Paths) -> None:
    """Plot the models as they are, beside the dense one of the same benchmark."""
    curves = []
    for timing in data["timings"]:
        eager = [row for row in timing["rows"] if not row["compiled"]]
        (dense,) = (row for row in eager if row["model"] == "dense")
        dynamic = [row for row in eager if row["model"] == "dynamic"]
        curves.append({**timing, "dense": dense, "rows": dynamic})
    times.draw_over_tau(curves, heading(data), data["note"], paths)
