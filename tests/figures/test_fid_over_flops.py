"""FID over FLOPs: the curves of a sweep's record."""

from __future__ import annotations

import numpy as np
from matplotlib import colors

from dmoe_var.experiment.points import LABELS, curves_of
from dmoe_var.figures import fid_over_flops
from dmoe_var.figures.style import COLOURS


def setting(group, label, gmac, fid):
    return {"group": group, "label": label, "flops_gmac": gmac, "fid_mean": fid, "fid_std": 0.5}


DENSE = setting("dense", "dense", 10.0, 20.0)
LAST = [setting("last", f"{tau:g}", 10 - 9 * tau, 20 + tau) for tau in (0.3, 0.1, 0.2)]
ALL = [setting("all", "0.1", 8.0, 30.0)]
LISTS = [setting("lists", "paper", 8.2, 21.0), setting("chosen", "ours", 8.1, 20.1)]


def test_draw(opened, tmp_path):
    path = tmp_path / "figure.png"
    curves = curves_of([DENSE, *LAST, *ALL, *LISTS])
    fid_over_flops.draw(curves, "fid_efflite0_64px", "a title", "a note", path)
    width, height = opened(path).size
    assert 500 < width < 1500
    assert 350 < height < 1100


def test_every_setting_is_there(unsaved):
    """Each group in its own colour, the chosen tau a red cross, error bars of fid_std."""
    curves = curves_of([DENSE, *LAST, *ALL, *LISTS])
    (axis,) = unsaved(fid_over_flops, fid_over_flops.draw, curves, "fid", "title", "").axes
    drawn = {}
    for container in axis.containers:
        line, _, (bars,) = container.lines
        points = np.column_stack(line.get_data())
        drawn[container.get_label()] = points.tolist(), line.get_marker(), line.get_color()
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        assert ends == [[y - 0.5, y + 0.5] for _, y in points]
    by_group = {group: drawn[label] for group, label in LABELS.items()}
    assert by_group["dense"][:2] == ([[10.0, 20.0]], "*")
    assert by_group["last"][0] == sorted([s["flops_gmac"], s["fid_mean"]] for s in LAST)
    assert by_group["chosen"][:2] == ([[8.1, 20.1]], "x")
    assert {group: by_group[group][2] for group in by_group} == {g: COLOURS[g] for g in by_group}
    red, green, blue = colors.to_rgb(COLOURS["chosen"])
    assert red > 2 * max(green, blue)
    assert axis.get_ylabel() == "FID"
    assert {text.get_text() for text in axis.texts} == {"0.1", "0.2", "0.3"}


def test_both_accountings_of_the_same_points(unsaved):
    """FID on the y axes, as counted on the left and as the authors charge it on the right. Lines
    follow the FLOPs as counted on both sides, and the sides share a legend."""
    rows = [
        {**row, "flops_gmac_authors": row["flops_gmac"] - 1.5 * i} for i, row in enumerate(LAST)
    ]
    curves = curves_of(rows)
    figure = unsaved(fid_over_flops, fid_over_flops.draw_accounting, curves, "fid", "title", "note")
    left, right = figure.axes
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [curve["name"] for curve in curves]
    rising = sorted(rows, key=lambda row: row["flops_gmac"])
    for axis, key in ((left, "flops_gmac"), (right, "flops_gmac_authors")):
        (container,) = axis.containers
        points = np.column_stack(container[0].get_data()).tolist()
        assert points == [[row[key], row["fid_mean"]] for row in rising]
        assert axis.get_legend() is None
        assert axis.get_ylabel() == "FID"
    assert ["authors" in axis.get_xlabel() for axis in (left, right)] == [False, True]


def test_labels_of_a_crowd(unsaved):
    """Of many lines the ends are labelled; several points without a line are labelled all."""
    many = [{**curves_of(LAST)[0], "name": str(i)} for i in range(fid_over_flops.MANY_LINES + 1)]
    alone = {**many[0], "name": "alone", "line": False}
    for lines, labels in ((many, ["0.1", "0.3"]), (many[1:], ["0.1", "0.2", "0.3"])):
        curves = [*lines, alone]
        (axis,) = unsaved(fid_over_flops, fid_over_flops.draw, curves, "fid", "title", "").axes
        told = sorted(text.get_text() for text in axis.texts)
        assert told == sorted([*labels * len(lines), "0.1", "0.2", "0.3"])
