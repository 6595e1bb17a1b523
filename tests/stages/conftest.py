"""Stages on few digits, see tiny_experiment.py."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def few_digits(use_few_digits, monkeypatch):
    use_few_digits(monkeypatch)
