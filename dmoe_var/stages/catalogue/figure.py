"""Define a figure: its points, the stages that it reads, its data, how it is plotted, and what it
claims.

Legend: a need is a stage with its configuration; a curve is a list of points, each evaluated under
every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import Curve, read_curves, vary
from dmoe_var.experiment.record import RESULT_FILE, Record
from dmoe_var.figures.claims import Verdict, gap
from dmoe_var.figures.style import Paths

Changes = Mapping[str, Any]
Make = TypeVar("Make", bound="Callable[[Experiment], Figure]")
Data = dict[str, Any]
"""What a figure shows, as its JSON file has it."""


MADE_BY: dict[str, Callable[[Experiment], Figure]] = {}
"""The functions that make figures, by the figures' names."""


def figure(name: str) -> Callable[[Make], Make]:
    """Give a function that makes a figure the figure's name, as `figure=` takes it."""

    def add(make: Make) -> Make:
        MADE_BY[name] = make
        return make

    return add


@dataclass(frozen=True)
class Need:
    """A stage that has to be done for a figure."""

    stage: str
    experiment: Experiment


@dataclass(frozen=True)
class StageRun:
    """A stage whose own record or training curve is plotted. `shade` places it among its kind."""

    name: str
    stage: str
    changes: Changes
    shade: float | None = None
    method: str = "last"

    def experiment(self, experiment: Experiment) -> Experiment:
        """Make the stage's configuration."""
        return vary(experiment, self.changes)

    def place(self, experiment: Experiment) -> str:
        """Name the folder of the record within the experiment's."""
        return f"{self.stage}/{self.experiment(experiment).variant(self.stage)}"

    def record(self, experiment: Experiment) -> Record:
        return Record.read(self.experiment(experiment).folder(self.stage) / RESULT_FILE)


@dataclass(frozen=True)
class Claim:
    """One curve has a lower FID than another at the same FLOPs. Curves go by their names."""

    text: str
    better: str
    worse: str
    dense: tuple[str, ...] = ()
    """The dense model of each curve, if both FLOPs and FID are compared relative to it."""


@dataclass(frozen=True)
class Figure:
    """A figure of one experiment.

    draw(work, data, paths) plots what `data` holds. of_runs(work, runs) is the part of the data
    that comes from `runs`. pending says what the curves wait for, while they are not known.
    """

    title: str
    draw: Callable[[Experiment, Data, Paths], None]
    curves: Sequence[Curve] = ()
    runs: Sequence[StageRun] = ()
    of_runs: Callable[[Experiment, Sequence[StageRun]], Data] = lambda experiment, runs: {}
    claims: Sequence[Claim] = ()
    pending: str = ""

    def needs(self, experiment: Experiment) -> list[Need]:
        """List all that the figure reads."""
        seeds = experiment.config.figures.used_seeds
        points = [point for curve in self.curves for point in curve.points]
        evaluated = [
            Need("evaluate", point.experiment(experiment, seed))
            for point in points
            for seed in seeds
        ]
        return [*(Need(run.stage, run.experiment(experiment)) for run in self.runs), *evaluated]

    def data(self, experiment: Experiment, name: str) -> Data:
        """Read all that the figure shows, from records alone."""
        data: Data = {"figure": name, "title": self.title, "note": note(experiment)}
        data["fingerprint"] = experiment.fingerprint("figures")
        if self.curves:
            data |= read_curves(experiment, self.curves, experiment.config.figures.used_seeds)
        return data | self.of_runs(experiment, self.runs)

    def verdicts(self, data: Data) -> list[Verdict]:
        """Judge each claim by the data. A claim about a curve that is not there is left out."""
        curves = {curve["name"]: curve for curve in data.get("curves", ())}
        found = []
        for claim in self.claims:
            if {claim.better, claim.worse, *claim.dense} <= curves.keys():
                dense = [curves[name] for name in claim.dense]
                between = gap(curves[claim.better], curves[claim.worse], dense)
                names = claim.better, claim.worse
                found.append(Verdict(claim.text, data["figure"], *names, between))
        return found


def heading(data: Data) -> str:
    """Write the line above a figure."""
    return f"Figure {data['figure']}: {data['title']}"


def at_size(experiment: Experiment) -> Experiment:
    """Set the number of images per point that the figures ask for."""
    figures = experiment.config.figures
    return (
        vary(experiment, {"evaluate.num_samples": figures.quick_samples})
        if figures.quick
        else experiment
    )


def note(experiment: Experiment) -> str:
    """Say in one line what a figure rests on."""
    config, figures = experiment.config, experiment.config.figures
    seeds = len(figures.used_seeds)
    text = f"{config.name}: {config.evaluate.num_samples} images a point, {seeds} seed"
    text += "s, bars: standard deviation over them" if seeds > 1 else ""
    return f"QUICK: {text}; no error bars" if figures.quick else text


def shades(values: Collection[Any]) -> list[float]:
    """Spread shades evenly over 0..1, one per value."""
    return [i / max(1, len(values) - 1) for i in range(len(values))]


def fitting_sizes(experiment: Experiment) -> tuple[int, ...]:
    """Find expert sizes that divide the FFN into two or more. Raise ConfigError if none does."""
    hidden = experiment.config.var.hidden
    sizes = sorted(experiment.config.figures.expert_sizes)
    fitting = tuple(size for size in sizes if hidden % size == 0 and size < hidden)
    if not fitting:
        raise ConfigError(f"figures.expert_sizes={sizes}: none divides the FFN's {hidden} neurons")
    return fitting
