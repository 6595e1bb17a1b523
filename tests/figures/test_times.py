"""Throughput by scale, and where the time of a batch goes."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from dmoe_var.figures import part_times, times


def test_a_bar_for_each_scale_and_model(unsaved):
    """Side by side about the scale's place, in the order that is given."""
    bars = [
        {"name": "dense", "method": "dense", "shade": None, "images_per_s": [900.0, 80.0]},
        {"name": "ours", "method": "chosen", "shade": None, "images_per_s": [950.0, 120.0]},
    ]
    (axis,) = unsaved(times, times.draw_throughput, bars, "title", "note").axes
    for given, drawn, side in zip(bars, axis.containers, (-0.2, 0.2), strict=True):
        assert drawn.get_label() == given["name"]
        assert [bar.get_height() for bar in drawn] == given["images_per_s"]
        middles = [bar.get_x() + bar.get_width() / 2 for bar in drawn]
        assert middles == pytest.approx([side, 1 + side])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2"]


def test_parts_of_an_image_stand_end_to_end(unsaved):
    """Milliseconds of a batch over its images; what was not timed by part is left out."""
    about = {"device": "cpu", "dtype": "float32"}
    rows = [
        {"name": "a", "batch_size": 4, "by_part_ms": {"head": 8.0, "attention": 4.0}, **about},
        {"name": "b", "batch_size": 1, **about},
        {"name": "c", "batch_size": 2, "by_part_ms": {"attention": 6.0, "decoder": 1.0}, **about},
    ]
    (axis,) = unsaved(part_times, part_times.draw_part_times, rows).axes
    found = {}
    for bar in axis.patches:
        if bar.get_width():
            row = round(bar.get_y() + bar.get_height() / 2)
            found[row, to_hex(bar.get_facecolor()).upper()] = bar.get_x(), bar.get_width()
    colours = part_times.PART_COLOURS
    assert found == {
        (0, colours["attention"]): (0, 1), (0, colours["head"]): (1, 2),
        (1, colours["attention"]): (0, 3), (1, colours["decoder"]): (3, 0.5),
    }  # fmt: skip
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a, batch 4", "c, batch 2"]
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["attention", "head", "decoder"]


def test_times_are_ratios_to_the_dense_model_of_their_run(unsaved):
    """Two runs, one on a machine twice as slow: the same curve."""
    rows = [{"tau": 0.5, "ms_median": 6.0, "ms_p10": 5.0, "ms_p90": 8.0}]
    slow = [{"tau": 0.5, "ms_median": 12.0, "ms_p10": 10.0, "ms_p90": 16.0}]
    curves = [
        {"name": "a", "method": "last", "shade": 0.0, "dense": {"ms_median": 4.0}, "rows": rows},
        {"name": "b", "method": "last", "shade": 1.0, "dense": {"ms_median": 8.0}, "rows": slow},
    ]
    (axis,) = unsaved(times, times.draw_over_tau, curves, "title", "note").axes
    for bars in axis.containers:
        assert bars[0].get_ydata() == pytest.approx([1.5])
        (segment,) = bars[2][0].get_segments()
        assert segment[:, 1] == pytest.approx([1.25, 2.0])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "dense VAR (4 to 8 ms)", "a", "b",
    ]  # fmt: skip
