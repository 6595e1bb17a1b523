"""The figures by name. Each is a function that makes an experiment's figure."""

from __future__ import annotations

from collections.abc import Callable

from dmoe_var.experiment.work import Work
from dmoe_var.stages.catalogue import curves, pictures, timing, training
from dmoe_var.stages.catalogue.figure import Figure

FIGURES: dict[str, Callable[[Work], Figure]] = {
    "2a": pictures.same_seeds,
    "2b": pictures.experts,
    "3": curves.trade,
    "4": curves.single_scales,
    "5": curves.depths,
    "6": training.alphas,
    "7": curves.without_relu,
    "8a": curves.sizes,
    "8b": timing.throughput,
    "9": timing.over_tau,
    "10": training.routers,
    "11": pictures.same_seeds_smoothed,
    "12": pictures.experts_by_tau,
    "rules": curves.rules,
    "calibration": curves.calibration,
    "accounting": curves.accounting,
}
