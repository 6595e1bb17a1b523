"""Figures are drawn by objects of their own: a user's matplotlib stays as it is."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from dmoe_var.figures import sample_grid


def test_neither_a_users_style_nor_a_backend_is_touched(tmp_path, monkeypatch):
    """A notebook names a backend that is missing in what it starts, and only pyplot looks for it:
    no figure may import that."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for path in Path(sample_grid.__file__).parent.glob("*.py"):
        runpy.run_path(str(path))
    before = dict(dict.items(matplotlib.rcParams))  # looking a backend up would choose one
    sample_grid.draw({"dense": np.zeros((4, 8, 8, 3), np.uint8)}, 2, tmp_path / "grid.png")
    assert dict(dict.items(matplotlib.rcParams)) == before
    with Image.open(tmp_path / "grid.png") as picture:
        assert min(picture.size) > 100
