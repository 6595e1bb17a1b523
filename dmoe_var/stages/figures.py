"""Figures from records: which are missing, making them in the order that shares the most, drawing.

Legend: a step is a stage with its configuration that has no record yet.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from dmoe_var.distributed import from_main, is_main
from dmoe_var.errors import DataError
from dmoe_var.experiment.contents import held
from dmoe_var.experiment.graph import order, record_if_done, run_stage
from dmoe_var.experiment.points import joined, vary
from dmoe_var.experiment.record import RESULT_FILE, Record, whole_record
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.experiment.work import Work
from dmoe_var.figures import claims, expert_maps, fid_over_flops, sample_grid, times
from dmoe_var.figures import training_curves as training
from dmoe_var.figures.style import Paths
from dmoe_var.files import note as say_once
from dmoe_var.files import read_json, write_text
from dmoe_var.sampling.draw import SAMPLES_FILE, Samples
from dmoe_var.stages import evaluate
from dmoe_var.stages.figure_catalogue import FIGURES, Figure, Need, Run, at_size
from dmoe_var.stages.maps import CHOSEN, stored_maps
from dmoe_var.stages.sample import Pictures
from dmoe_var.training.tracking import read_lines

LOSSES = (
    training.Panel("ce", "cross-entropy, nats a token"),
    training.Panel("hoyer", "Hoyer loss (1 to hidden width)", log=True),
)
ROUTER_LOSS = (training.Panel("loss", "router loss (squared error of norms)", log=True),)
TIMING_SHOWN = {"throughput": "medians", "times": "bars: p10 to p90"}
Data = dict[str, Any]


@held()
def missing(work: Work) -> list[Need]:
    """The steps that the chosen figures still need, each after what it builds on, those on the
    same models one after the other."""
    chains: dict[tuple[str, ...], list[Need]] = {}
    for name in work.config.figures.names:
        for need in FIGURES[name].needs(work):
            upstream = order(need.work, need.stage)[:-1]
            chain = tuple(str(need.work.folder(stage)) for stage in upstream)
            steps = [Need(stage, need.work) for stage in upstream] + [need]
            chains.setdefault(chain, []).extend(steps)
    found: dict[str, Need] = {}
    for steps in chains.values():
        for step in steps:
            folder = str(step.work.folder(step.stage))
            if folder in found or step.work.is_given(step.stage):
                continue
            if record_if_done(step.work, step.stage) is None:
                found[folder] = step
    return list(found.values())


def minutes(work: Work, stages: Collection[str]) -> dict[str, float]:
    """About how long each of these stages takes: the median of its records in this run, else what
    the configuration says; not in the result where neither tells. Of evaluations, an image."""
    found = {}
    for stage in stages:
        taken = []
        for path in sorted((work.root / stage).glob(f"*/{RESULT_FILE}")):
            record = whole_record(path, "left out")
            if record is not None:
                images = record.num_samples if stage == "evaluate" else 1
                taken.append(_seconds(record) / images / 60)
        told = work.config.figures.minutes
        if taken:
            found[stage] = median(taken)
        elif stage in told:
            found[stage] = told[stage] / (1000 if stage == "evaluate" else 1)
    return found


def _seconds(record: Record) -> float:
    started, ended = (datetime.fromisoformat(t) for t in (record.started, record.ended))
    return (ended - started).total_seconds()


def plan_text(work: Work, steps: Sequence[Need]) -> str:
    """The steps in their order, with estimates."""
    lines, total, unknown = [], 0.0, 0
    each = minutes(work, {step.stage for step in steps})
    for i, step in enumerate(steps, 1):
        guess = each.get(step.stage)
        if guess is not None and step.stage == "evaluate":
            guess *= step.work.config.evaluate.num_samples
        total += guess or 0
        unknown += guess is None
        shown = "    ?" if guess is None else f"{guess:5.1f}"
        lines.append(f"{i:4d}  {shown} min  {step.work.folder(step.stage)}")
    left = f", {unknown} more of unknown length" if unknown else ""
    lines.append(f"{len(steps)} steps, about {total:.0f} min{left}")
    if "calibration" in work.config.figures.names and any(s.stage == "calibrate" for s in steps):
        lines.append("the points of figure calibration come after its tau are found")
    return "\n".join(lines)


def make(work: Work) -> None:
    """Make what is missing; an interrupted run goes on where it stopped."""
    while steps := missing_everywhere(work):
        for step in steps:
            step.work.check(step.stage)
        bench: evaluate.Bench | None = None
        shown = tqdm(steps, desc="figures", disable=not work.progress)
        for step in shown:
            shown.set_postfix_str(f"{step.stage}/{step.work.variant(step.stage)}"[:60])
            if step.stage == "evaluate":
                bench = bench or evaluate.Bench(step.work)
                shared = bench
                run_stage(step.work, step.stage, lambda w, b=shared: evaluate.run(w, b))  # type: ignore[misc]
            else:
                run_stage(step.work, step.stage)


def missing_everywhere(work: Work) -> list[Need]:
    """`missing`, as the main process sees it."""
    steps = missing(work)
    folders = from_main([str(s.work.folder(s.stage)) for s in steps])
    return [s for s in steps if str(s.work.folder(s.stage)) in set(folders)]


def run(work: Work) -> StageResult:
    """Draw the chosen figures as PNG and PDF, their data beside them as JSON, and claims.md.

    DataError where records are missing and `figures.make` is off.
    """
    figures = work.config.figures
    if figures.make:
        make(work)
    elif steps := missing(work):
        first = steps[0].work.folder(steps[0].stage)
        raise DataError(
            f"figures.figure={','.join(figures.figure)}: {len(steps)} records are missing, the "
            f"first is {first / RESULT_FILE}; make=true makes them, plan=true lists them"
        )
    if is_main():
        for name in tqdm(figures.names, desc="draw", disable=not work.progress):
            draw(work, name, data_of(work, name))
        verdicts = claims.verdicts(_drawn(work))
        write_text(work.folder("figures") / "claims.md", claims.table(verdicts) + "\n")
    about = {"figures": list(figures.names), "quick": figures.quick, "note": note(work)}
    return from_main(StageResult({"figures": len(figures.names)}, 0, about))


def _drawn(work: Work) -> dict[str, Data]:
    """The data of all figures in the folder that are of these settings, by earlier commands too."""
    files = {name: work.folder("figures") / f"figure_{name}.json" for name in FIGURES}
    there = {name: _stored(path) for name, path in files.items() if path.exists()}
    now = at_size(work).fingerprint("figures")
    return {name: data for name, data in there.items() if data.get("fingerprint") == now}


def _stored(path: Path) -> Data:
    """Data of a figure; none, and a note, where a crash left something else in the file."""
    try:
        data = read_json(path, DataError)
    except DataError as error:
        say_once(f"{error}; left out")
        return {}
    return data if isinstance(data, dict) else {}


def note(work: Work) -> str:
    """What a figure rests on, in one line."""
    work = at_size(work)
    config, figures = work.config, work.config.figures
    seeds = len(figures.used_seeds)
    text = f"{config.name}: {config.evaluate.num_samples} images a point, {seeds} seed"
    text += "s, bars: standard deviation over them" if seeds > 1 else ""
    return f"QUICK: {text}; no error bars" if figures.quick else text


def data_of(work: Work, name: str) -> Data:
    """All that a figure shows, read from records alone."""
    work, figure = at_size(work), FIGURES[name]
    data: Data = {"figure": name, "title": figure.title, "note": note(work)}
    data["fingerprint"] = work.fingerprint("figures")
    if curves := figure.curves(work):
        data |= _curve_data(work, curves)
    if figure.kind in ("alphas", "routers"):
        data["runs"] = [_training_data(work, run) for run in figure.runs(work)]
    if figure.kind in ("throughput", "times"):
        data["timings"] = [_timing_data(work, run) for run in figure.runs(work)]
        data["note"] = _timing_note(data["timings"], TIMING_SHOWN[figure.kind])
    if figure.kind in ("grid", "maps"):
        (only,) = figure.runs(work)
        data["record"] = _place(vary(work, only.changes), only.stage)
    return data


def _place(work: Work, stage: str) -> str:
    return f"{stage}/{work.variant(stage)}"


def _record(work: Work, stage: str) -> Record:
    return Record.read(work.folder(stage) / RESULT_FILE)


def _curve_data(work: Work, curves: Sequence[Any]) -> Data:
    drawn, fid_name = [], ""
    for curve in curves:
        rows = []
        for point in curve.points:
            works = point.works(work, work.config.figures.used_seeds)
            records = [_record(each, "evaluate") for each in works]
            fid_name = records[0].about["fidelity"]
            rows.append({"label": point.label, "value": point.value, **joined(records)})
        drawn.append(
            {
                "name": curve.name,
                "method": curve.method,
                "shade": curve.shade,
                "line": curve.line,
                "rows": rows,
            }
        )
    return {"fid": fid_name, "curves": drawn}


def _training_data(work: Work, run: Run) -> Data:
    """Every logged value of a training run, by key, as [step, value]."""
    folder = vary(work, run.changes).folder(run.stage)
    lines = read_lines(folder / "metrics.jsonl", step=int)
    keys = {key for line in lines for key in line if key in ("ce", "hoyer", "loss")}
    values = {key: [[x["step"], x[key]] for x in lines if key in x] for key in sorted(keys)}
    return {"name": run.name, "shade": run.shade, **values}


def _timing_data(work: Work, run: Run) -> Data:
    changed = vary(work, run.changes)
    record = _record(changed, run.stage)
    return {
        "name": run.name,
        "method": run.method,
        "shade": run.shade,
        "record": _place(changed, run.stage),
        "device": record.device,
        "threads": record.threads,
        "rows": record.about["timings"],
    }


def draw(work: Work, name: str, data: Data) -> None:
    """figure_<name>.png, .pdf, and .json of what they show."""
    folder, figure = work.folder("figures"), FIGURES[name]
    paths = tuple(folder / f"figure_{name}.{kind}" for kind in ("png", "pdf"))
    title = f"Figure {name}: {figure.title}"
    write_text(folder / f"figure_{name}.json", json.dumps(data, indent=1) + "\n")
    if figure.kind == "curves":
        fid_over_flops.draw_curves(data["curves"], data["fid"], title, data["note"], paths)
    elif figure.kind == "accounting":
        fid_over_flops.draw_accounting(data["curves"], data["fid"], title, data["note"], paths)
    elif figure.kind in ("alphas", "routers"):
        losses = LOSSES if figure.kind == "alphas" else ROUTER_LOSS
        training.draw(data, losses, title, paths)
    elif figure.kind == "throughput":
        _draw_throughput(data, title, paths)
    elif figure.kind == "times":
        _draw_times(data, title, paths)
    else:
        _draw_pictures(work, figure, data, paths)


def _draw_throughput(data: Data, title: str, paths: Paths) -> None:
    (timing,) = data["timings"]
    names = {"dense": ("dense VAR", "dense"), "dynamic": ("DMoE-VAR, chosen tau", "chosen")}
    bars = []
    for row in timing["rows"]:
        if row["model"] in names and not row["compiled"]:
            label, method = names[row["model"]]
            seconds = [ms / 1000 for ms in row["by_scale_ms"]]
            rates = [row["batch_size"] / s for s in seconds]
            bars.append({"name": label, "method": method, "shade": None, "images_per_s": rates})
    times.draw_throughput(bars, title, data["note"], paths)


def _draw_times(data: Data, title: str, paths: Paths) -> None:
    curves = []
    for timing in data["timings"]:
        eager = [row for row in timing["rows"] if not row["compiled"]]
        (dense,) = (row for row in eager if row["model"] == "dense")
        dynamic = [row for row in eager if row["model"] == "dynamic"]
        curves.append({**timing, "dense": dense, "rows": dynamic})
    times.draw_over_tau(curves, title, data["note"], paths)


def _timing_note(timings: Sequence[Data], shown: str) -> str:
    batch = timings[0]["rows"][0]["batch_size"]
    where = dict.fromkeys(f"{each['device']}, {each['threads']} threads" for each in timings)
    return f"batch {batch}, {' and '.join(where)}; {shown}"


def _draw_pictures(work: Work, figure: Figure, data: Data, paths: Paths) -> None:
    work = at_size(work)
    (only,) = figure.runs(work)
    changed = vary(work, only.changes)
    folder = changed.folder(only.stage)
    if figure.kind == "maps":
        record = _record(changed, only.stage)
        settings = record.about["settings"]
        shown = settings[:1] if data["figure"] == "2b" else settings
        by_tau = {_setting_name(s): stored_maps(folder, i) for i, s in enumerate(shown)}
        expert_maps.draw(by_tau, record.about["scales"], paths)
        return
    record = _record(changed, only.stage)
    panels = {}
    for model in ("dense", "dynamic"):
        panels[record.about[model]] = Samples.load(folder / model / SAMPLES_FILE).images
    cells = Pictures.of(changed.config)
    sample_grid.draw(panels, cells.columns, paths, cells.row_names, cells.column_names)


def _setting_name(setting: Data) -> str:
    return "chosen tau" if setting["name"] == CHOSEN else f"tau {setting['name']}"


READS = (
    "seed", "dtype", "data", "vqvae", "var", "base",
    "train_vqvae", "train_var", "conversion", "sparsify", "split", "train_router",
    "moe", "selection", "sampling", "evaluate.num_samples", "evaluate.format", "fidelity",
    "sweep", "pruning", "sample", "benchmark", "calibrate", "maps", "figures",
)  # fmt: skip
STAGE = Stage("figures", run, READS, refuse=evaluate.refuse_given_samples, always_runs=True)
