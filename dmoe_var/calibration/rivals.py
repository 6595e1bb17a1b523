"""Choose tau in other ways, for the comparison: one tau, tau rising linearly, and the search that
the paper's authors used. All see the same recorded scores and equally many measured losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dmoe_var.calibration.allocation import tau_at
from dmoe_var.errors import ConfigError

Taus = tuple[float, ...]
Cost = Callable[[Sequence[float]], float]
"""GMAC of an image, from a tau for each sparse scale."""
Loss = Callable[[Sequence[float]], float]

SPREAD = 0.2
"""How far above the scale before the search may draw the next one's tau, as the paper's authors
did (in their polarity, below)."""
MARGIN = 0.01
"""How far above a budget a found point may lie, as a share of it."""


def check(budgets: Sequence[float]) -> None:
    """Raise ConfigError if ways to choose tau are to be compared and Optuna is not installed."""
    if budgets and importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            f"calibrate.budgets={list(budgets)}: the two-objective search among the ways compared "
            "needs the package optuna, which is not installed; pip install -e '.[search]', or "
            "leave budgets empty"
        )


def one_tau(cost: Cost, num_scales: int, target: float) -> Taus:
    """Find the one tau for all sparse scales that costs `target`. Raise ValueError if none does."""
    tau = tau_at(lambda t: cost((t,) * num_scales), target)
    return (tau,) * num_scales


def rising(cost: Cost, loss: Loss, num_scales: int, target: float, tries: int) -> Taus:
    """Find tau that rise linearly over the sparse scales: of `tries` slopes the one of least loss.
    Raise ValueError if none costs as little as `target`."""
    steps = np.linspace(0, 1 / max(1, num_scales - 1), tries)

    def line(first: float, step: float) -> Taus:
        return tuple(min(1.0, first + i * float(step)) for i in range(num_scales))

    lines = [
        line(tau_at(lambda t, s=step: cost(line(t, s)), target), step)  # type: ignore[misc]
        for step in steps
    ]
    return min(lines, key=loss)


@dataclass(frozen=True)
class Trial:
    """A point of the search."""

    taus: Taus
    loss: float
    cost: float


def search(
    cost: Cost,
    loss: Loss,
    num_scales: int,
    trials: int,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> list[Trial]:
    """Search by two-objective TPE (Optuna) for the Pareto points of loss and cost, cheapest first.
    `progress` is called after each trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed)
    )

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        taus = [trial.suggest_float("tau0", 0, 1)]
        for i in range(1, num_scales):
            taus.append(min(1.0, taus[-1] + trial.suggest_float(f"rise{i}", 0, SPREAD)))
        trial.set_user_attr("taus", taus)
        found = loss(taus), cost(taus)
        progress()
        return found

    study.optimize(objective, n_trials=trials)
    found = [Trial(tuple(t.user_attrs["taus"]), *t.values) for t in study.best_trials]
    return sorted(found, key=lambda trial: trial.cost)


def within(found: Sequence[Trial], target: float) -> Trial | None:
    """Pick the point of least loss that costs no more than `target`; None if all cost more."""
    affordable = [trial for trial in found if trial.cost <= target * (1 + MARGIN)]
    return min(affordable, key=lambda trial: trial.loss, default=None)
