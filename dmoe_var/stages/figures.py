"""Make figures from records: find what is missing, make it in the order that shares most, plot.

Legend: a step is a stage with its configuration that has no record yet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from tqdm import tqdm

from dmoe_var.distributed import from_main, is_main
from dmoe_var.errors import DataError
from dmoe_var.experiment.contents import held
from dmoe_var.experiment.graph import order, record_if_done, run_stage
from dmoe_var.experiment.record import RESULT_FILE
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.experiment.work import Work
from dmoe_var.figures import claims
from dmoe_var.files import read_json, write_text
from dmoe_var.stages import evaluate
from dmoe_var.stages.catalogue import FIGURES
from dmoe_var.stages.catalogue.figure import Figure, Need, at_size, note


def chosen(work: Work) -> dict[str, Figure]:
    """Build the figures that are asked for, by name."""
    return {name: FIGURES[name](at_size(work)) for name in work.config.figures.names}


@held()
def missing(work: Work) -> list[Need]:
    """List the steps that the chosen figures still need. Each comes after what it builds on, and
    steps on the same models follow each other."""
    chains: dict[tuple[str, ...], list[Need]] = {}
    for figure in chosen(work).values():
        for need in figure.needs(at_size(work)):
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


def plan_text(work: Work, steps: Sequence[Need]) -> str:
    """Write the steps in their order as text."""
    lines = [f"{i:4d}  {step.work.folder(step.stage)}" for i, step in enumerate(steps, 1)]
    pending = [
        f"the points of figure {name} come after {figure.pending}"
        for name, figure in chosen(work).items()
        if figure.pending
    ]
    return "\n".join([*lines, f"{len(steps)} steps", *pending])


def make(work: Work) -> None:
    """Make what is missing; an interrupted run goes on where it stopped."""
    while steps := missing_everywhere(work):
        for step in steps:
            step.work.check(step.stage)
        bench: evaluate.Bench | None = None
        shown = tqdm(steps, desc="figures", disable=not work.progress)
        for step in shown:
            shown.set_postfix_str(f"{step.stage}/{step.work.variant(step.stage)}"[:60])
            function = None
            if step.stage == "evaluate":
                bench = bench or evaluate.Bench(step.work)
                function = partial(evaluate.run, bench=bench)
            run_stage(step.work, step.stage, function)


def missing_everywhere(work: Work) -> list[Need]:
    """List the missing steps as the main process sees them."""
    steps = missing(work)
    folders = from_main({s.work.folder(s.stage) for s in steps})
    return [s for s in steps if s.work.folder(s.stage) in folders]


def run(work: Work) -> StageResult:
    """Plot the chosen figures as PNG and PDF, and write their data as JSON, and claims.md.

    Raise DataError if records are missing and `figures.make` is off.
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
        for name, figure in tqdm(chosen(work).items(), desc="draw", disable=not work.progress):
            data = figure.data(at_size(work), name)
            path = work.folder("figures") / f"figure_{name}.json"
            write_text(path, json.dumps(data, indent=1) + "\n")
            figure.draw(at_size(work), data, [path.with_suffix(kind) for kind in (".png", ".pdf")])
        write_text(work.folder("figures") / "claims.md", claims.table(_verdicts(work)) + "\n")
    about = {"figures": list(figures.names), "quick": figures.quick, "note": note(at_size(work))}
    return from_main(StageResult({"figures": len(figures.names)}, 0, about))


def _verdicts(work: Work) -> list[claims.Verdict]:
    """Judge all figures in the folder that have these settings, also those of earlier commands."""
    found: list[claims.Verdict] = []
    now = at_size(work).fingerprint("figures")
    for name, figure in FIGURES.items():
        path = work.folder("figures") / f"figure_{name}.json"
        data = read_json(path, DataError) if path.exists() else {}
        if data.get("fingerprint") == now:
            found += figure(at_size(work)).verdicts(data)
    return found


READS = (
    "seed", "dtype", "data", "vqvae", "var", "base",
    "train_vqvae", "train_var", "conversion", "sparsify", "split", "train_router",
    "moe", "selection", "sampling", "evaluate.num_samples", "evaluate.format", "fidelity",
    "sweep", "pruning", "sample", "benchmark", "calibrate", "maps", "figures",
)  # fmt: skip
STAGE = Stage("figures", run, READS, refuse=evaluate.refuse_given_samples, always_runs=True)
