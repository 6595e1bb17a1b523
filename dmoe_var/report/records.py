"""Read what the page tells of an experiment's records, as plain values: stages, curves, tables.

Each point has the mean over its seeds. Scales count from 0 here and from 1 in the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmoe_var.data.class_names import class_names, title
from dmoe_var.data.image_sets import ImageFolder, all_pixels
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import ALONE, LABELS, joined, mean
from dmoe_var.experiment.record import RESULT_FILE, Record, whole_record
from dmoe_var.experiment.view import optional, says, within
from dmoe_var.figures.fid_over_flops import display_name
from dmoe_var.figures.style import MARKERS, colour
from dmoe_var.metrics.flops import SAMPLER_PARTS
from dmoe_var.moe.selection import recorded_selection
from dmoe_var.report.pictures import grid_uri
from dmoe_var.sampling.draw import SAMPLES_FILE, Samples, balanced_labels
from dmoe_var.sampling.store import PNG_FOLDER

MAKING = ("train_vqvae", "train_var", "sparsify", "split", "train_router")
MEASURING = ("sweep", "evaluate", "calibrate", "benchmark")
"""Stages that build on the model, and have records of their own."""
GRID_COLUMNS = 10  # at most, of a point's pictures
COMPARED = ("sampling", "fidelity", "evaluate.num_samples")
"""Sections and keys in which points of one picture agree."""


def stages(experiment: Experiment) -> list[dict[str, Any]]:
    """List every stage in the order in which they run: done, given, missing or made otherwise."""
    making = dict.fromkeys((*MAKING, experiment.whole.expert_stage))
    return [_stage(experiment, stage) for stage in (*making, *MEASURING)]


def _stage(experiment: Experiment, stage: str) -> dict[str, Any]:
    records = [record for _, record in found(experiment, stage)]
    ours = [record for record in records if not differences(experiment, record)]
    state, note, base = "missing", f"scripts/{stage}.py makes it", experiment.config.base
    if ours:
        state, note = "present", ""
    elif records:
        state, note = "made otherwise", "; ".join(differences(experiment, records[-1])[:3])
    elif experiment.is_given(stage):
        given = base.vqvae if stage == "train_vqvae" else base.var
        state, note = "given", f"{given}, not trained here"
    return {"name": stage, "records": [_shown(r) for r in ours], "note": note, "state": state}


def _shown(record: Record) -> dict[str, Any]:
    shown = ("variant", "started", "ended", "device", "dtype", "seed", "num_samples", "git_commit")
    return {**{k: getattr(record, k) for k in shown}, "metrics": dict(record.metrics)}


def found(experiment: Experiment, stage: str) -> list[tuple[Path, Record]]:
    """Read all whole records of a stage, whatever they were made with, except those of given
    images, and those with a drafter, which is no part of the model that is told of."""
    paths = sorted((experiment.root / stage).glob(f"*/{RESULT_FILE}"))
    read = [(path, whole_record(path, "left out")) for path in paths]
    others = ("evaluate.samples", "drafter.var")
    return [(p, r) for p, r in read if r is not None and not any(map(r.config.get, others))]


def differences(experiment: Experiment, record: Record) -> list[str]:
    """List how a record's model differs from that of `work`, one line per key."""
    upstream = None
    model = record.config.get("evaluate.model")
    if record.stage in (*MAKING, "tune_experts"):
        upstream = record.stage
    elif record.stage == "benchmark":
        dynamic = record.config.get("benchmark.tau") or record.config.get("benchmark.chosen")
        upstream = None if dynamic else "train_var"
    elif record.stage == "evaluate" and model == "dense":
        upstream = "train_var"
    elif record.stage == "evaluate" and model == "pruned":
        upstream = "sparsify" if record.config["pruning.model"] == "sparse" else "train_var"
    return experiment.differing(upstream, record) if upstream else other_experts(experiment, record)


def other_experts(experiment: Experiment, record: Record) -> list[str]:
    """List how the experts that a record tells of differ from those of `work`."""
    lines = experiment.differing(experiment.whole.expert_stage, record)
    tuned, on = record.is_tuned, experiment.whole.tune_experts.on
    return lines + (["experts are not tuned, there they are"] if tuned and not on else [])


class Curves:
    """The points of the sweep, and of all evaluations of this model that compare with them."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        swept = whole_record(experiment.folder("sweep") / RESULT_FILE, "left out")
        self.sweep = None if swept is None or differences(experiment, swept) else swept
        self._records = {
            f"evaluate/{path.parent.name}": r for path, r in found(experiment, "evaluate")
        }
        self._curves: dict[str, dict[str, Any]] = {}
        for row in self.sweep.about["settings"] if self.sweep else ():
            self._add(row["group"], LABELS[row["group"]], row["label"], row)
        self._add_loose()

    def shown(self) -> dict[str, Any]:
        """Return curves with their points, the dense ones first, and how their axes are called."""
        curves = list(self._curves.values())
        compared = filter(self._comparable, self._records.values())
        first = self.sweep or next(compared, None)
        name = first.about["fidelity"] if first else "fid"
        return {
            "curves": curves,
            "fid_name": display_name(name),
            "num_samples": self.experiment.config.evaluate.num_samples,
            "parts": list(SAMPLER_PARTS),
        }

    def _comparable(self, record: Record) -> bool:
        """Tell whether a record compares with the sweep's: same model, sampling and measure."""
        ours, theirs = self.experiment.relevant("evaluate"), record.config
        said = {key for key in theirs if optional(key) and says(key, theirs)}
        same = all(
            theirs.get(key) == ours.get(key)
            for key in {*ours, *said}
            if within(key, COMPARED) and key != "fidelity.weights"  # where a file lies
        )
        return same and not differences(self.experiment, record)

    def _add_loose(self) -> None:
        """Add evaluations that are no points of the sweep, one point per setting, joined over the
        latest of each seed. For the sweep's own settings, the sweep says which seeds count."""
        taken = {point for c in self._curves.values() for row in c["rows"] for point in row["at"]}
        groups: dict[tuple[str, str, str], dict[int, str]] = {}
        for at, record in sorted(self._records.items(), key=lambda item: item[1].ended):
            if at not in taken and self._comparable(record):
                by_seed = groups.setdefault(setting_of(record.config), {})
                by_seed[record.seed] = at  # one per seed: other batch sizes make no other
        for at in taken & self._records.keys():
            groups.pop(setting_of(self._records[at].config), None)
        for (method, name, label), by_seed in sorted(groups.items()):
            points = [by_seed[seed] for seed in sorted(by_seed)]
            row = {**joined([self._records[at] for at in points]), "points": points}
            self._add(method, name, label, row)

    def _add(self, method: str, name: str, label: str, row: Mapping[str, Any]) -> None:
        """Add one point of a curve, from its numbers joined over the seeds. Those by scale and by
        part come from the records that are still there."""
        points = row["points"]
        records = [self._records[point] for point in points if point in self._records]
        curve = self._curves.setdefault(
            name,
            {
                "name": name,
                "colour": None if method == "dense" else colour(method),
                "marker": MARKERS[method],
                "line": method not in ALONE,
                "rows": [],
            },
        )
        number = sum(len(c["rows"]) for c in self._curves.values())
        first = self._records.get(points[0])
        curve["rows"].append({
            "id": f"point-{number}",
            "dense": method == "dense",
            "chosen": method == "chosen",
            "label": label,
            "tau": ", ".join(f"{tau:g}" for tau in row["tau"]) if "tau" in row else label,
            "fid": row["fid_mean"],
            "fid_std": row["fid_std"],
            "seeds": len(points),
            "gmac": row["flops_gmac"],
            "gmac_std": row["flops_gmac_std_over_images"],
            "at": list(points),
            "scales": by_scale(records),
            "parts": [mean_of(records, f"flops_{part}_gmac") for part in SAMPLER_PARTS],
            "agreement": row.get("label_agreement"),
            **grid(self.experiment.root / points[0], first, self.experiment),
        })  # fmt: skip


def setting_of(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name method (its colour), curve and label of an evaluation by its record's configuration."""
    model = config["evaluate.model"]
    if model == "dense":
        return "dense", LABELS["dense"], "dense"
    scales = ", ".join(str(si + 1) for si in config["moe.scales"])
    if model == "pruned":
        which, how = config["pruning.model"], config["pruning.rule"]
        name = f"Pruned-FFN ({which}, {how}), scales {scales}"
        return "pruned", name, f"share {config['pruning.share']:g}"
    selection = recorded_selection(config)
    rule, values = selection.kind, selection.values
    several = "," in values or ";" in values
    method = ("lists" if several else "last") if rule.proposed else rule.name
    means = ", means of skipped experts" if config.get("moe.skipped") == "mean" else ""
    return method, f"{rule.label}, scales {scales}{means}", values.replace(",", ", ") or rule.name


def mean_of(records: Sequence[Record], metric: str) -> float | None:
    """Average a metric; None if a record lacks it or there is no record."""
    if not records or any(metric not in record.metrics for record in records):
        return None
    return mean(records, metric)


def by_scale(records: Sequence[Record]) -> list[dict[str, float | None]]:
    """Average GMAC and the density of experts (`share`) by scale."""
    rows: list[dict[str, float | None]] = []
    while (gmac := mean_of(records, f"flops_scale{len(rows)}_gmac")) is not None:
        rows.append({"gmac": gmac, "share": mean_of(records, f"experts_share_scale{len(rows)}")})
    return rows


def grid(folder: Path, record: Record | None, experiment: Experiment) -> dict[str, Any]:
    """Join a point's first pictures into one and name their classes, or say that they are gone."""
    report, config = experiment.config.report, experiment.config
    if record is None:
        return {"grid": None, "grid_note": f"{folder.name}: its record is gone"}
    labels = balanced_labels(record.num_samples, config.var.num_classes)[: report.grid_images]
    pngs = [folder / PNG_FOLDER / f"{index:06d}.png" for index in range(len(labels))]
    if (folder / SAMPLES_FILE).exists():
        samples = Samples.load(folder / SAMPLES_FILE)
        images, labels = np.asarray(samples.images[: len(labels)]), samples.labels[: len(labels)]
    elif all(png.exists() for png in pngs):
        images = all_pixels(ImageFolder(folder, config.data.image_size, tuple(pngs)))
    else:
        return {"grid": None, "grid_note": f"{folder.name}: its pictures are gone"}
    columns = min(GRID_COLUMNS, config.var.num_classes, len(images))
    names = class_names(config.data, config.var.num_classes)
    shown = dict.fromkeys(title(names, int(label)) for label in labels)
    return {
        "grid": grid_uri(images, columns, report.grid_side),
        "grid_columns": columns,
        "grid_note": f"seed {record.seed}, classes {', '.join(shown)}",
    }
