"""Figures are drawn by objects of their own: a user's matplotlib stays as it is."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
from PIL import Image

from dmoe_var.figures import sample_grid

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from dmoe_var.figures import sample_grid
sample_grid.draw({"dense": np.zeros((4, 8, 8, 3), np.uint8)}, 2, Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_users_style_is_not_touched(tmp_path):
    before = dict(matplotlib.rcParams)
    sample_grid.draw({"dense": np.zeros((4, 8, 8, 3), np.uint8)}, 2, tmp_path / "grid.png")
    assert dict(matplotlib.rcParams) == before
    with Image.open(tmp_path / "grid.png") as picture:
        assert min(picture.size) > 100


def test_a_backend_that_is_not_there(tmp_path, monkeypatch):
    """As a notebook names it to what it starts."""
    monkeypatch.setenv("MPLBACKEND", "module://not_installed.backend_inline")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "grid.png")]
    subprocess.run(command, check=True)
    assert (tmp_path / "grid.png").exists()
