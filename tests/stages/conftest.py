"""Stages on few digits, see tiny_experiment.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def few_digits(use_few_digits, monkeypatch):
    use_few_digits(monkeypatch)


@pytest.fixture(scope="module")
def kept_runs(trained, use_few_digits, tmp_path_factory):
    """A copy of `trained` for a file's own fixtures, in which more is done once for its tests."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("kept") / "runs"))
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        yield folder
