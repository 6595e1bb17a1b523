"""Define points of quality-cost curves (configurations that differ from an experiment's in a few
keys) and join their records over seeds. All that is plotted or told of evaluations is read here.

Legend: a row is a point as JSON has it, with its numbers joined over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.record import RESULT_FILE, Record

LABELS = {
    "dense": "dense VAR",
    "last": "one tau, last scales",
    "all": "one tau, all scales",
    "lists": "tau a scale",
    "chosen": "operating point",
}
"""The curves of a sweep by the `group` of their rows, which is their method."""
ALONE = ("dense", "lists", "chosen")
"""Methods whose points make no line."""
MEASURES = ("inception_score", "precision", "recall", "label_agreement")
"""Beginnings of the names of metrics that tell of quality beside FID, if they were measured."""


def vary(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """Change dotted keys of a work: vary(work, {"sparsify.alpha": 0.1}).

    A tau for each layer gives way to a new tau. Raise ConfigError for an unknown key, or values
    that do not go together.
    """
    if "selection.tau" in changes or "selection.rule" in changes:
        changes = {"selection.layer_tau": (), **changes}
    try:
        return replace(experiment, whole=_with(experiment.whole, changes, ""))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def operating_point(experiment: Experiment) -> dict[str, Any]:
    """Return the keys that the operating point changes: those of the sweep's chosen tau list. They
    are none if another selection was asked for or no list is chosen."""
    sweep, asked = (
        experiment.config.sweep,
        experiment.config.selection != experiment.baseline.selection,
    )
    if sweep.chosen is None or asked:
        return {}
    return {"selection.rule": "threshold", "selection.tau": sweep.lists[sweep.chosen]}


def _with(section: Any, changes: Mapping[str, Any], place: str) -> Any:
    """Change a dataclass by dotted keys, all at once: what belongs together is checked together."""
    values: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if name not in getattr(section, "__dataclass_fields__", ()):
            raise ValueError(f"{place}{key}: unknown key")
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            values[name] = value
    for name, below in inner.items():
        values[name] = _with(getattr(section, name), below, f"{place}{name}.")
    return replace(section, **values)


@dataclass(frozen=True)
class Point:
    """A point of a curve before its seeds: its label, where it stands along the curve (tau, share,
    ...), and the keys in which it differs from the experiment."""

    label: str
    value: float | None
    changes: Mapping[str, Any]

    def experiment(self, experiment: Experiment, seed: int) -> Experiment:
        """Make the evaluation of one seed."""
        return vary(experiment, {**self.changes, "evaluate.seed": seed})


@dataclass(frozen=True)
class Curve:
    """Points that are plotted as one line, or alone. `method` gives the colour in every figure;
    shade (0..1) tells curves of one method apart."""

    name: str
    method: str
    points: tuple[Point, ...]
    shade: float | None = None
    line: bool = True


def single(
    name: str, method: str, label: str, changes: Mapping[str, Any], shade: float | None = None
) -> Curve:
    """Make a curve of a single point."""
    return Curve(name, method, (Point(label, None, changes),), shade, line=False)


def dense_curve(
    name: str = LABELS["dense"], changes: Mapping[str, Any] = {}, shade: float | None = None
) -> Curve:
    """Make the curve of a dense model."""
    return single(name, "dense", name, {**changes, "evaluate.model": "dense"}, shade)


def tau_curve(
    name: str,
    method: str,
    tau: Sequence[float],
    changes: Mapping[str, Any] = {},
    shade: float | None = None,
    rule: str = "threshold",
) -> Curve:
    """Make a curve with a point per tau, which is the same at all of `moe.scales`."""
    fixed = {**changes, "evaluate.model": "dynamic", "selection.rule": rule}
    if rule == "oracle":  # nothing is timed, and small experts one by one are slow
        fixed["moe.impl"] = "reference"
    points = (Point(f"{t:g}", t, {**fixed, "selection.tau": (t,)}) for t in tau)
    return Curve(name, method, tuple(points), shade)


def read_curves(
    experiment: Experiment, curves: Sequence[Curve], seeds: Sequence[int]
) -> dict[str, Any]:
    """Read the records of curves whose points are all evaluated. fid: the metric's name."""
    drawn, fid = [], ""
    for curve in curves:
        rows = []
        for point in curve.points:
            folders = [point.experiment(experiment, seed).folder("evaluate") for seed in seeds]
            records = [Record.read(folder / RESULT_FILE) for folder in folders]
            fid = records[0].about["fidelity"]
            rows.append({"label": point.label, "value": point.value, **joined(records)})
        about = {key: getattr(curve, key) for key in ("name", "method", "shade", "line")}
        drawn.append({**about, "rows": rows})
    return {"fid": fid, "curves": drawn}


def curves_of(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sort a sweep's record (`about["settings"]`) into curves, as `read_curves` gives them."""
    return [
        {"name": label, "method": group, "shade": None, "line": group not in ALONE, "rows": rows}
        for group, label in LABELS.items()
        if (rows := [row for row in settings if row["group"] == group])
    ]


def joined(records: Sequence[Record]) -> dict[str, Any]:
    """Join the records of one point: mean and spread (sample standard deviation) over its seeds,
    and where the records are."""
    fid = np.array([record.metrics[record.about["fidelity"]] for record in records])
    row = {
        "fid_mean": float(fid.mean()),
        "fid_std": float(fid.std(ddof=1)) if len(fid) > 1 else 0.0,
        "fid_by_seed": fid.tolist(),
        "flops_gmac": mean(records, "flops_gmac"),
        "flops_gmac_std_over_images": mean(records, "flops_gmac_std"),
        "points": [f"evaluate/{record.variant}" for record in records],
    }
    others = ("flops_gmac_authors", "experts_share_", "sampling_ms_per_image", *MEASURES)
    for name in records[0].metrics:
        if name.startswith(others) and all(name in record.metrics for record in records):
            row[name] = mean(records, name)
    return row


def mean(records: Sequence[Record], metric: str) -> float:
    """Average a metric over the seeds."""
    return float(np.mean([record.metrics[metric] for record in records]))
