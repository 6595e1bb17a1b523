"""Make figures of pictures: the same seeds from both models (2a, 11), what experts ran (2b, 12)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import operating_point
from dmoe_var.experiment.record import RESULT_FILE, Record
from dmoe_var.figures import expert_maps, sample_grid
from dmoe_var.figures.style import Paths
from dmoe_var.sampling.draw import SAMPLES_FILE, Samples
from dmoe_var.stages.catalogue.figure import Changes, Data, Figure, StageRun, figure
from dmoe_var.stages.maps import CHOSEN, stored_maps
from dmoe_var.stages.sample import Pictures

SMOOTH = {"sampling.cfg": 4.0, "sampling.top_p": 0.95, "sampling.more_smooth": True}
"""How the paper samples pictures that are looked at, not measured."""


@figure("2a")
def same_seeds(experiment: Experiment) -> Figure:
    """Make figure 2a, sampled as all measurements are."""
    return _grid(experiment, "same seeds, dense and dynamic", {"sample.per_class": 2})


@figure("11")
def same_seeds_smoothed(experiment: Experiment) -> Figure:
    """Make figure 11, sampled as the paper samples pictures to look at."""
    changes = {**SMOOTH, "sample.per_class": 3}
    return _grid(experiment, "same seeds, guidance 4, smoothed", changes)


@figure("2b")
def experts(experiment: Experiment) -> Figure:
    """Make figure 2b, at the operating point."""
    return _maps(experiment, "experts over the picture", slice(1))


@figure("12")
def experts_by_tau(experiment: Experiment) -> Figure:
    """Make figure 12, at the operating point and at several tau."""
    return _maps(experiment, "experts over the picture, several tau", slice(None))


def _grid(experiment: Experiment, title: str, changes: Changes) -> Figure:
    changes = {"sample.model": "both", **operating_point(experiment), **changes}
    run = StageRun("samples", "sample", changes)
    return Figure(title, draw_grid, runs=[run], of_runs=_cells)


def _cells(experiment: Experiment, runs: Sequence[StageRun]) -> Data:
    """Say where the pictures are, and what the rows and columns of each grid are called."""
    (run,) = runs
    pictures = Pictures.of(run.experiment(experiment).config)
    names = {"row_names": pictures.row_names, "column_names": pictures.column_names}
    return {"record": run.place(experiment), "columns": pictures.columns, **names}


def draw_grid(experiment: Experiment, data: Data, paths: Paths) -> None:
    """Plot a panel per model."""
    folder = experiment.root / data["record"]
    about = Record.read(folder / RESULT_FILE).about
    panels = {}
    for model in ("dense", "dynamic"):
        panels[about[model]] = Samples.load(folder / model / SAMPLES_FILE).images
    sample_grid.draw(panels, data["columns"], paths, data["row_names"], data["column_names"])


def _maps(experiment: Experiment, title: str, settings: slice) -> Figure:
    """Make a figure of some of the stage's `settings`. The first of them is the operating point."""
    run = StageRun("maps", "maps", operating_point(experiment))
    return Figure(title, partial(draw_maps, settings=settings), runs=[run], of_runs=_place)


def _place(experiment: Experiment, runs: Sequence[StageRun]) -> Data:
    (run,) = runs
    return {"record": run.place(experiment)}


def draw_maps(experiment: Experiment, data: Data, paths: Paths, settings: slice) -> None:
    """Plot a block of pictures and maps per setting."""
    folder = experiment.root / data["record"]
    about = Record.read(folder / RESULT_FILE).about
    by_tau = {}
    for i, each in enumerate(about["settings"][settings]):
        name = "chosen tau" if each["name"] == CHOSEN else f"tau {each['name']}"
        by_tau[name] = stored_maps(folder, i)
    expert_maps.draw(by_tau, about["scales"], paths)
