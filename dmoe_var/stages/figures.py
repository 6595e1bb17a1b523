"""Make figures from records: find what is missing, make it in the order that shares most, plot.

Legend: a step is a stage with its configuration that has no record yet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dmoe_var.checkpoints.load import cached_file
from dmoe_var.config.root import Config
from dmoe_var.distributed import from_main, is_main
from dmoe_var.errors import DataError
from dmoe_var.experiment.contents import held, naming
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import order, record_if_done, run_stage
from dmoe_var.experiment.record import RESULT_FILE
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.figures import claims
from dmoe_var.files import note as say_once
from dmoe_var.files import read_json, write_text
from dmoe_var.stages import evaluate
from dmoe_var.stages.catalogue import FIGURES, named
from dmoe_var.stages.catalogue.figure import Data, Figure, Need, at_size, note
from dmoe_var.stages.parts.loaded import drafter_keys


def chosen(experiment: Experiment) -> dict[str, Figure]:
    """Build the figures that are asked for, by name."""
    return {
        name: FIGURES[name](at_size(experiment)) for name in named(experiment.config.figures.figure)
    }


@held()
def missing(experiment: Experiment) -> list[Need]:
    """List the steps that the chosen figures still need. Each comes after what it builds on, and
    steps on the same models follow each other."""
    chains: dict[tuple[str, ...], list[Need]] = {}
    for figure in chosen(experiment).values():
        for need in figure.needs(at_size(experiment)):
            upstream = order(need.experiment, need.stage)[:-1]
            chain = tuple(str(need.experiment.folder(stage)) for stage in upstream)
            steps = [Need(stage, need.experiment) for stage in upstream] + [need]
            chains.setdefault(chain, []).extend(steps)
    found: dict[str, Need] = {}
    for steps in chains.values():
        for step in steps:
            folder = str(step.experiment.folder(step.stage))
            if folder in found or step.experiment.is_given(step.stage):
                continue
            if record_if_done(step.experiment, step.stage) is None:
                found[folder] = step
    return list(found.values())


def plan_text(experiment: Experiment, steps: Sequence[Need]) -> str:
    """Write the steps in their order as text."""
    lines = [f"{i:4d}  {step.experiment.folder(step.stage)}" for i, step in enumerate(steps, 1)]
    pending = [
        f"the points of figure {name} come after {figure.pending}"
        for name, figure in chosen(experiment).items()
        if figure.pending
    ]
    return "\n".join([*lines, f"{len(steps)} steps", *pending])


def make(experiment: Experiment) -> None:
    """Make what is missing; an interrupted run goes on where it stopped. Several runs at once share
    the work, also for different figures."""
    experiment.check("figures")
    while steps := missing_everywhere(experiment):
        _find_depths(experiment, steps)
        for step in steps:
            step.experiment.check(step.stage)
        bench: evaluate.Bench | None = None
        shown = tqdm(steps, desc="figures", disable=not experiment.progress)
        for step in shown:
            shown.set_postfix_str(f"{step.stage}/{step.experiment.variant(step.stage)}"[:60])
            function = None
            if step.stage == "evaluate":
                bench = bench or evaluate.Bench(step.experiment)
                function = partial(evaluate.run, bench=bench)
            run_stage(step.experiment, step.stage, function)


def _find_depths(experiment: Experiment, steps: Sequence[Need]) -> None:
    """Raise CheckpointError for a model of another depth that a step is about to read, and that is
    neither here nor a name."""
    read = {step.experiment.config.base.var for step in steps}
    for depth, source in experiment.config.figures.depths.items():
        if source is not None and source in read:
            with naming(f"figures.depths.{depth}", source):
                cached_file(source, "var")


def missing_everywhere(experiment: Experiment) -> list[Need]:
    """List the missing steps as the main process sees them."""
    steps = missing(experiment)
    folders = from_main({s.experiment.folder(s.stage) for s in steps})
    return [s for s in steps if s.experiment.folder(s.stage) in folders]


def run(experiment: Experiment) -> StageResult:
    """Plot the chosen figures as PNG and PDF, and write their data as JSON, and claims.md.

    Raise DataError if records are missing and `figures.make` is off.
    """
    figures = experiment.config.figures
    if figures.make:
        make(experiment)
    elif steps := missing(experiment):
        first = steps[0].experiment.folder(steps[0].stage)
        raise DataError(
            f"figures.figure={','.join(figures.figure)}: {len(steps)} records are missing, the "
            f"first is {first / RESULT_FILE}; make=true makes them, plan=true lists them"
        )
    if is_main():
        for name, figure in tqdm(
            chosen(experiment).items(), desc="draw", disable=not experiment.progress
        ):
            data = figure.data(at_size(experiment), name)
            path = experiment.folder("figures") / f"figure_{name}.json"
            write_text(path, json.dumps(data, indent=1) + "\n")
            figure.draw(
                at_size(experiment), data, [path.with_suffix(kind) for kind in (".png", ".pdf")]
            )
        write_text(
            experiment.folder("figures") / "claims.md", claims.table(_verdicts(experiment)) + "\n"
        )
    names = named(figures.figure)
    about = {"figures": list(names), "quick": figures.quick, "note": note(at_size(experiment))}
    return from_main(StageResult({"figures": len(names)}, 0, about))


def _verdicts(experiment: Experiment) -> list[claims.Verdict]:
    """Judge all figures in the folder that have these settings, also those of earlier commands."""
    found: list[claims.Verdict] = []
    now = at_size(experiment).fingerprint("figures")
    for name, figure in FIGURES.items():
        path = experiment.folder("figures") / f"figure_{name}.json"
        data = _stored(path) if path.exists() else {}
        if data.get("fingerprint") == now:
            found += figure(at_size(experiment)).verdicts(data)
    return found


def _stored(path: Path) -> Data:
    """Read a figure's data. Give none, with a note, if the file holds something else."""
    try:
        data = read_json(path, DataError)
    except DataError as error:
        say_once(f"{error}; left out")
        return {}
    return data if isinstance(data, dict) else {}


def _refuse(config: Config) -> None:
    named(config.figures.figure)
    evaluate.refuse_given_samples(config)


READS = (
    "seed", "dtype", "data", "vqvae", "var", "base",
    "train_vqvae", "train_var", "conversion", "sparsify", "split", "train_router",
    "tune_experts", "moe", "selection", "sampling", "evaluate.num_samples", "evaluate.format",
    "fidelity", "sweep", "pruning", "sample", "benchmark", "calibrate", "maps", "figures",
)  # fmt: skip


def reads(config: Config, ours: Config) -> Keys:
    return (*READS, *drafter_keys(config), *evaluate.needs_classifier(config))


STAGE = Stage("figures", run, reads, refuse=_refuse, always_runs=True)
