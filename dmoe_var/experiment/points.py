"""Points of quality-cost curves: configurations that differ from an experiment's in a few keys,
and their records, joined over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.record import Record
from dmoe_var.experiment.work import Work


def vary(work: Work, changes: Mapping[str, Any]) -> Work:
    """The same work with dotted keys changed: vary(work, {"sparsify.alpha": 0.1}).

    A tau for each layer gives way to a new tau. ConfigError for a key that is none, or values that
    do not go together.
    """
    if "selection.tau" in changes or "selection.rule" in changes:
        changes = {"selection.layer_tau": (), **changes}
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *path, last = key.split(".")
        section = nested
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    try:
        return replace(work, whole=_with(work.whole, nested, ""))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def operating_point(work: Work) -> dict[str, Any]:
    """What differs from the configuration at the operating point: the sweep's chosen tau list,
    unless another selection was asked for."""
    sweep, asked = work.config.sweep, work.config.selection != work.baseline.selection
    if sweep.chosen is None or asked:
        return {}
    return {"selection.rule": "threshold", "selection.tau": sweep.lists[sweep.chosen]}


def _with(section: Any, changes: Mapping[str, Any], place: str) -> Any:
    """A dataclass with nested changes, all at once: what belongs together is checked together."""
    known = {f.name for f in fields(section)}
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{place}{name}: unknown key")
        old = getattr(section, name)
        inner = is_dataclass(old) and isinstance(value, Mapping)
        values[name] = _with(old, value, f"{place}{name}.") if inner else value
    return replace(section, **values)


@dataclass(frozen=True)
class Point:
    """A point of a curve before its seeds: its label, where it stands along the curve (tau, share,
    ...), and the keys in which it differs from the experiment."""

    label: str
    value: float | None
    changes: Mapping[str, Any]

    def works(self, work: Work, seeds: Iterable[int]) -> list[Work]:
        """The evaluation of each seed."""
        return [vary(work, {**self.changes, "evaluate.seed": seed}) for seed in seeds]


@dataclass(frozen=True)
class Curve:
    """Points that are drawn as one line, or alone. `method` gives its colour in every figure;
    shade (0..1) tells curves of one method apart."""

    name: str
    method: str
    points: tuple[Point, ...]
    shade: float | None = None
    line: bool = True


def joined(records: Sequence[Record]) -> dict[str, Any]:
    """Mean and spread (sample standard deviation) over the seeds of one point, and where its
    records are."""
    fid = np.array([record.metrics[record.about["fidelity"]] for record in records])
    row = {
        "fid_mean": float(fid.mean()),
        "fid_std": float(fid.std(ddof=1)) if len(fid) > 1 else 0.0,
        "fid_by_seed": fid.tolist(),
        "flops_gmac": mean(records, "flops_gmac"),
        "flops_gmac_std_over_images": mean(records, "flops_gmac_std"),
        "points": [f"evaluate/{record.variant}" for record in records],
    }
    authors = "flops_gmac_authors"
    if all(authors in record.metrics for record in records):
        row[authors] = mean(records, authors)
    return row


def mean(records: Sequence[Record], metric: str) -> float:
    """Of a metric over the seeds."""
    return float(np.mean([record.metrics[metric] for record in records]))
