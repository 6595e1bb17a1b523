"""Calls timed in turn: what is timed and in which order, and what failing processes become."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dmoe_var.metrics.timing import Timing, time_in_turn

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """timed_calls.py, under a name by which processes find it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("timed_calls")


def assert_no_process_is_left():
    deadline = time.monotonic() + 300
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []


def test_in_turn(calls, warm_processes, tmp_path):
    """A B A B ...; of each the times of the rounds that count, the last output and the peak of its
    own process, also of memory that was given back."""
    log, size = tmp_path / "log", 300_000_000
    builders = {
        "A": (calls.watched, ("A", str(log), (6.0, 2.0, 0.7), 1)),
        "B": (calls.watched, ("B", str(log), (), size)),
    }
    timings = time_in_turn(builders, CPU, 2, repeats=2, warmup=1)
    assert log.read_text() == "ABABAB"
    assert list(timings) == ["A", "B"]
    first, second = timings["A"].runs_ms
    assert 2000 <= first < 6000
    assert 700 <= second < 2000
    assert len(timings["B"].runs_ms) == 2
    assert min(timings["B"].runs_ms) < 700
    outputs = [timing.output for timing in timings.values()]
    assert [output.dtype for output in outputs] == [np.float32] * 2
    assert [(number, threads) for number, _, threads in outputs] == [(3, 2)] * 2
    assert len({os.getpid(), *(pid for _, pid, _ in outputs)}) == 3
    more = timings["B"].peak_memory_bytes - timings["A"].peak_memory_bytes
    assert 0.8 * size < more < 1.5 * size
    assert_no_process_is_left()


def test_peak_memory_is_not_the_starting_process(calls):
    """A process starts as a copy of the one that starts it, whose peak is none of its own."""
    size = 1_200_000_000
    assert torch.ones(size, dtype=torch.uint8)[-1] == 1
    (timing,) = time_in_turn({"idle": (calls.idle, ())}, CPU, 1, 1).values()
    assert timing.peak_memory_bytes < size


def test_metrics():
    """Eleven runs of 1 to 11 ms in any order: percentiles fall on runs."""
    runs = (7.0, 3.0, 11.0, 1.0, 9.0, 5.0, 2.0, 10.0, 4.0, 8.0, 6.0)
    timing = Timing(runs, 2_500_000, np.zeros(1, np.float32))
    assert timing.metrics("ours") == {
        "ours_ms_median": 6.0,
        "ours_ms_p10": 2.0,
        "ours_ms_p90": 10.0,
        "ours_ms_min": 1.0,
        "ours_peak_memory_mb": 2.5,
    }
    assert timing.percentile(33) == pytest.approx(np.percentile(runs, 33))


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("fails_to_build", "^bad: ValueError: no such model$"),
        ("dies", "^bad: its process died"),
        ("dies_while_others_run", "^bad: its process died"),
    ],
)
def test_a_process_that_fails(calls, warm_processes, builder, message):
    """It is named, and the others end with it."""
    log = (os.devnull, (1.0, 1.0), 1)
    builders = {"bad": (getattr(calls, builder), ()), "good": (calls.watched, ("good", *log))}
    with pytest.raises(RuntimeError, match=message):
        time_in_turn(builders, CPU, 1, 2)
    assert_no_process_is_left()
