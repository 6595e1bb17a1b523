"""The maps stage: which selections it draws with."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_var.stages.graph import run_stage
from dmoe_var.stages.maps import stored_maps


@pytest.mark.parametrize(
    ("selection", "name"),
    [
        ({"tau": [0.5]}, "threshold 0.5"),
        ({"layer_tau": [[0.5], [0.5]]}, "threshold by layer 0.5; 0.5"),
        ({"rule": "oracle", "tau": [0.5, 1.0]}, "oracle 0.5,1"),
    ],
)
def test_chosen_is_what_is_configured(make_work, runs, selection, name):
    """The chosen maps are of the configured rule, a tau for each layer included; the others of one
    tau."""
    changes = {f"selection.{key}": value for key, value in selection.items()}
    work = make_work(runs, {**changes, "maps.tau": [0.0, 0.5], "maps.images": 2})
    record = run_stage(work, "maps")
    shown = [(each["name"], each["selection"]) for each in record.about["settings"]]
    assert shown == [("chosen", name), ("0", "threshold 0"), ("0.5", "threshold 0.5")]
    chosen, every, half = (stored_maps(work.folder("maps"), i).maps for i in range(3))
    assert (every == 1).all()
    assert (half < 1).any()
    assert np.array_equal(chosen, half) == (selection.get("rule") != "oracle")
