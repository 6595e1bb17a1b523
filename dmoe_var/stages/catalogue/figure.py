"""Define a figure: its points, the stages that it reads, its data, how it is plotted, and what it
claims.

Legend: a need is a stage with its configuration; a curve is a list of points, each evaluated under
every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.points import Curve, read_curves, vary
from dmoe_var.experiment.record import RESULT_FILE, Record
from dmoe_var.experiment.work import Work
from dmoe_var.figures.claims import Verdict, gap
from dmoe_var.figures.style import Paths

Changes = Mapping[str, Any]
Data = dict[str, Any]
"""What a figure shows, as its JSON file has it."""


@dataclass(frozen=True)
class Need:
    """A stage that has to be done for a figure."""

    stage: str
    work: Work


@dataclass(frozen=True)
class StageRun:
    """A stage whose own record or training curve is plotted. `shade` places it among its kind."""

    name: str
    stage: str
    changes: Changes
    shade: float | None = None
    method: str = "last"

    def work(self, work: Work) -> Work:
        """Make the stage's configuration."""
        return vary(work, self.changes)

    def place(self, work: Work) -> str:
        """Name the folder of the record within the experiment's."""
        return f"{self.stage}/{self.work(work).variant(self.stage)}"

    def record(self, work: Work) -> Record:
        return Record.read(self.work(work).folder(self.stage) / RESULT_FILE)


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
    draw: Callable[[Work, Data, Paths], None]
    curves: Sequence[Curve] = ()
    runs: Sequence[StageRun] = ()
    of_runs: Callable[[Work, Sequence[StageRun]], Data] = lambda work, runs: {}
    claims: Sequence[Claim] = ()
    pending: str = ""

    def needs(self, work: Work) -> list[Need]:
        """List all that the figure reads."""
        seeds = work.config.figures.used_seeds
        points = [point for curve in self.curves for point in curve.points]
        evaluated = [Need("evaluate", point.work(work, seed)) for point in points for seed in seeds]
        return [*(Need(run.stage, run.work(work)) for run in self.runs), *evaluated]

    def data(self, work: Work, name: str) -> Data:
        """Read all that the figure shows, from records alone."""
        data: Data = {"figure": name, "title": self.title, "note": note(work)}
        data["fingerprint"] = work.fingerprint("figures")
        if self.curves:
            data |= read_curves(work, self.curves, work.config.figures.used_seeds)
        return data | self.of_runs(work, self.runs)

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


def at_size(work: Work) -> Work:
    """Set the number of images per point that the figures ask for."""
    figures = work.config.figures
    return vary(work, {"evaluate.num_samples": figures.quick_samples}) if figures.quick else work


def note(work: Work) -> str:
    """Say in one line what a figure rests on."""
    config, figures = work.config, work.config.figures
    seeds = len(figures.used_seeds)
    text = f"{config.name}: {config.evaluate.num_samples} images a point, {seeds} seed"
    text += "s, bars: standard deviation over them" if seeds > 1 else ""
    return f"QUICK: {text}; no error bars" if figures.quick else text


def shades(values: Collection[Any]) -> list[float]:
    """Spread shades evenly over 0..1, one per value."""
    return [i / max(1, len(values) - 1) for i in range(len(values))]


def fitting_sizes(work: Work) -> tuple[int, ...]:
    """Find expert sizes that divide the FFN into two or more. Raise ConfigError if none does."""
    hidden = work.config.var.hidden
    sizes = sorted(work.config.figures.expert_sizes)
    fitting = tuple(size for size in sizes if hidden % size == 0 and size < hidden)
    if not fitting:
        raise ConfigError(f"figures.expert_sizes={sizes}: none divides the FFN's {hidden} neurons")
    return fitting
