"""Ways to choose tau: held-out loss over predicted FLOPs."""

from __future__ import annotations

import numpy as np

from dmoe_var.figures import calibration
from dmoe_var.figures.style import COLOURS


def test_every_row_is_a_point_of_its_method(unsaved):
    curves = {
        "by_layer": [{"gmac": 9.0, "ce": 3.0}, {"gmac": 8.0, "ce": 4.0}],
        "fixed": [{"gmac": 8.1, "ce": 4.5}],
    }
    (axis,) = unsaved(calibration, calibration.draw, curves, 10.0, "title").axes
    lines = {line.get_label(): line for line in axis.lines}
    assert np.column_stack(lines["calibrated by layer"].get_data()).tolist() == [[8, 4], [9, 3]]
    assert np.column_stack(lines["one tau"].get_data()).tolist() == [[8.1, 4.5]]
    assert lines["one tau"].get_color() == COLOURS["fixed"]
    assert lines["dense VAR"].get_xdata() == [10, 10]
    assert "cross-entropy" in axis.get_ylabel()
