"""Make figures of training: fine-tuning over alpha (6), routers under low and high alpha (10)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import Curve, Point, dense_curve, tau_curve
from dmoe_var.figures import training_curves
from dmoe_var.figures.style import Paths
from dmoe_var.figures.training_curves import Panel
from dmoe_var.stages.catalogue.figure import Data, Figure, StageRun, figure, heading, shades
from dmoe_var.training.tracking import read_lines

LOSSES = (
    Panel("ce", "cross-entropy, nats a token"),
    Panel("hoyer", "Hoyer loss (1 to hidden width)", log=True),
)
ROUTER_LOSS = (Panel("loss", "router loss (squared error of norms)", log=True),)


@figure("6")
def alphas(experiment: Experiment) -> Figure:
    """Make figure 6: losses at each alpha, and FID of the resulting models with every expert."""
    values = experiment.config.figures.alphas
    every = {"evaluate.model": "dynamic", "selection.rule": "all"}
    points = tuple(Point(f"{a:g}", a, {"sparsify.alpha": a, **every}) for a in values)
    return Figure(
        "fine-tuning over alpha",
        partial(draw, panels=LOSSES),
        curves=[dense_curve(), Curve("all experts", "last", points)],
        runs=_by_alpha("sparsify", values),
        of_runs=_losses,
    )


@figure("10")
def routers(experiment: Experiment) -> Figure:
    """Make figure 10: the routers' loss, and FID over FLOPs with these routers."""
    figures, values = experiment.config.figures, sorted(experiment.config.figures.router_alphas)
    runs = _by_alpha("train_router", values)
    tau = figures.along(figures.tau)
    curves = [tau_curve(run.name, "last", tau, run.changes, run.shade) for run in runs]
    return Figure(
        "routers under low and high alpha",
        partial(draw, panels=ROUTER_LOSS),
        curves=[dense_curve(), *curves],
        runs=runs,
        of_runs=_losses,
    )


def _by_alpha(stage: str, values: Sequence[float]) -> list[StageRun]:
    return [
        StageRun(f"alpha {alpha:g}", stage, {"sparsify.alpha": alpha}, shade)
        for alpha, shade in zip(values, shades(values), strict=True)
    ]


def _losses(experiment: Experiment, runs: Sequence[StageRun]) -> Data:
    """Read every logged loss of each run, by key, as [step, value]."""
    found = []
    for run in runs:
        lines = read_lines(run.experiment(experiment).folder(run.stage) / "metrics.jsonl", step=int)
        keys = {key for line in lines for key in line if key in ("ce", "hoyer", "loss")}
        values = {key: [[x["step"], x[key]] for x in lines if key in x] for key in sorted(keys)}
        found.append({"name": run.name, "shade": run.shade, **values})
    return {"runs": found}


def draw(experiment: Experiment, data: Data, paths: Paths, panels: Sequence[Panel]) -> None:
    """Plot a panel per loss, and one for FID."""
    training_curves.draw(data, panels, heading(data), paths)
