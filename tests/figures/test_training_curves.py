"""Losses over steps, and the FID that the runs led to."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_var.figures import training_curves
from dmoe_var.figures.training_curves import Panel

RUNS = [
    {"name": "alpha 0", "shade": 0.0, "ce": [[1, 5.0], [2, 4.0]], "hoyer": [[1, 60.0], [2, 50.0]]},
    {"name": "alpha 1", "shade": 1.0, "ce": [[1, 5.5], [2, 4.5]], "hoyer": [[1, 40.0], [2, 9.0]]},
]
PANELS = (Panel("ce", "cross-entropy"), Panel("hoyer", "Hoyer", log=True))


def row(label, gmac, fid, spread=0.5):
    return {"label": label, "flops_gmac": gmac, "fid_mean": fid, "fid_std": spread}


def curve(name, method, rows, line=True, shade=None):
    return {"name": name, "method": method, "shade": shade, "line": line, "rows": rows}


DENSE = curve("dense VAR", "dense", [row("dense VAR", 10.0, 7.0)], line=False)


def drawn(unsaved, *curves):
    data = {"runs": RUNS, "curves": [DENSE, *curves], "fid": "fid", "note": ""}
    return unsaved(training_curves, training_curves.draw, data, PANELS, "title").axes


def test_a_panel_for_each_loss_with_its_values(unsaved):
    ce, hoyer, last = drawn(unsaved, curve("all experts", "last", [row("0", 9, 8), row("1", 9, 6)]))
    for axis, key in ((ce, "ce"), (hoyer, "hoyer")):
        for run, line in zip(RUNS, axis.lines, strict=True):
            assert line.get_label() == run["name"]
            assert np.column_stack(line.get_data()).tolist() == run[key]
    assert [axis.get_yscale() for axis in (ce, hoyer)] == ["linear", "log"]
    assert [axis.get_ylabel() for axis in (ce, hoyer, last)] == ["cross-entropy", "Hoyer", "FID"]


def test_levels_of_models_with_every_expert(unsaved):
    """FID over the number in which the runs differ, beside the dense model's with its spread."""
    rows = [row("0", 9, 8.0, 0.25), row("1", 9, 6.0, 1.0)]
    *_, axis = drawn(unsaved, curve("all experts", "last", rows))
    (container,) = axis.containers
    assert container[0].get_ydata().tolist() == [8, 6]
    ends = [segment[:, 1].tolist() for segment in container[2][0].get_segments()]
    assert ends == [[7.75, 8.25], [5, 7]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1"]
    (level,) = [line for line in axis.lines if line.get_label() == "dense VAR"]
    assert set(level.get_ydata()) == {7}
    band = axis.patches[0].get_extents().transformed(axis.transData.inverted())
    assert (band.y0, band.y1) == (pytest.approx(6.5), pytest.approx(7.5))


def test_curves_of_several_runs_stand_over_flops(unsaved):
    curves = [
        curve(name, "last", [row("0.1", 8, fid), row("0", 9, fid - 1)], shade=shade)
        for name, fid, shade in (("alpha 0", 8.0, 0.0), ("alpha 1", 7.5, 1.0))
    ]
    *_, axis = drawn(unsaved, *curves)
    points = {c.get_label(): np.column_stack(c[0].get_data()).tolist() for c in axis.containers}
    assert points == {
        "dense VAR": [[10, 7]],
        "alpha 0": [[8, 8], [9, 7]],
        "alpha 1": [[8, 7.5], [9, 6.5]],
    }
