"""The additions that CONTRIBUTING.md shows fit the code as it is, and work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DIFFS = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.S | re.M)
USES = """
import runpy, sys
import torch
from dmoe_var.moe.experts import Dispatch, ExpertWeights
from dmoe_var.moe.experts.paths import path
from dmoe_var.moe.selection import RULES
from dmoe_var.stages.catalogue import FIGURES, named

rule = RULES["above_mean"](least=1.0)
assert rule(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [[False, False, True]]

weights = ExpertWeights(*(torch.randn(s) for s in ((3, 4, 8), (3, 4), (3, 4, 8), (8,))))
given = torch.randn(5, 8), Dispatch(torch.rand(5, 3) < 0.5), weights, torch.nn.ReLU()
torch.testing.assert_close(path("one_by_one").run(*given), path("reference").run(*given))

assert named(["strengths"]) == ("strengths",)
assert "strengths" in FIGURES

sys.argv = ["scripts/codes.py", "progress=false", "selection.rule=above_mean"]
sys.path.insert(0, "scripts")
runpy.run_path("scripts/codes.py", run_name="__main__")
"""


@pytest.fixture
def changed(tmp_path):
    """A copy of the checkout with all additions."""
    if shutil.which("git") is None:
        pytest.skip("git applies the diffs, and is not there")
    for folder in ("dmoe_var", "scripts", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for diff in DIFFS:
        command = ["git", "apply", "--unidiff-zero", "-"]
        subprocess.run(command, input=diff, cwd=tmp_path, text=True, check=True)
    return tmp_path


def test_additions_fit(changed):
    """A rule, its curve, a path, a figure and a stage."""
    assert len(DIFFS) == 5
    assert (changed / "dmoe_var" / "stages" / "codes.py").is_file()


@pytest.mark.slow
def test_additions_work(changed):
    env = {**os.environ, "PYTHONPATH": str(changed), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", USES]
    done = subprocess.run(run, cwd=changed, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = changed / "runs" / "digits" / "codes" / "default" / "result.json"
    assert 0 < json.loads(record.read_text())["metrics"]["used_scale6"] <= 1
