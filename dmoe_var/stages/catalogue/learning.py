"""Show the base VAR as it learns: losses by scale, FID and pictures of the models that it left on
the way (`train_var.snapshot_every`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import Curve, Point
from dmoe_var.experiment.record import RESULT_FILE, Record
from dmoe_var.figures import learning as drawing
from dmoe_var.figures.style import Paths
from dmoe_var.sampling.draw import Samples
from dmoe_var.stages.catalogue.figure import Data, Figure, StageRun, figure, heading
from dmoe_var.stages.train_var import snapshots
from dmoe_var.training.tracking import read_lines

ROWS = 8
"""Most rows of the strip of pictures, spread evenly over the snapshots."""


@figure("learning")
def learning(experiment: Experiment) -> Figure:
    """Compare the snapshots of base training; it need not be finished."""
    if experiment.config.base.var is not None:
        raise ConfigError(
            f"base.var={experiment.config.base.var}: figure=learning shows a base training, which "
            "base.var=null asks for"
        )
    folders = snapshots(experiment)
    if not folders:
        raise ConfigError(
            f"train_var.snapshot_every={experiment.config.train_var.snapshot_every}: "
            "figure=learning needs models that train_var has left on its way, and there are none"
        )
    points = tuple(
        Point(f"{step}", step, {"evaluate.model": "dense", "base.var": str(folder)})
        for step, folder in folders.items()
    )
    curve = Curve("the base model as it learns", "dense", points)
    return Figure("base training", draw, curves=[curve], of_runs=_losses)


def _losses(experiment: Experiment, runs: Sequence[StageRun]) -> Data:
    """Read what was validated: step, and each scale's cross-entropy and accuracy."""
    lines = read_lines(experiment.folder("train_var") / "metrics.jsonl", step=int)
    validated = [line for line in lines if "val_ce" in line]
    scales = range(experiment.config.var.num_scales)
    found: Data = {"steps": [line["step"] for line in validated]}
    for key in ("ce", "accuracy"):
        found[key] = [[line[f"val_{key}_scale{si}"] for line in validated] for si in scales]
    return {"validated": found, "patch_nums": list(experiment.config.var.patch_nums)}


def draw(experiment: Experiment, data: Data, paths: Paths) -> None:
    """Plot losses and FID above a strip with a picture of each class per snapshot."""
    (curve,) = data["curves"]
    rows = [curve["rows"][i] for i in _spread(len(curve["rows"]), ROWS)]
    strip = {
        f"step {row['value']:,}": _one_per_class(experiment.root / row["points"][0]) for row in rows
    }
    drawing.draw(data, strip, heading(data), paths)


def _spread(num: int, most: int) -> list[int]:
    """Choose at most `most` of `num` places, with the first and the last."""
    return sorted({int(i) for i in np.linspace(0, num - 1, min(num, most)).round()})


def _one_per_class(folder: Path) -> np.ndarray:
    """Return the first picture of each class, uint8 (classes, R, R, 3)."""
    samples = Samples.load(folder / Record.read(folder / RESULT_FILE).about["samples"])
    _, first = np.unique(samples.labels, return_index=True)
    return np.stack([samples.images[i] for i in first])
