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


@pytest.mark.parametrize(("repeats", "warmup"), [(3, 2), (1, 0)])
def test_in_turn(calls, warm_processes, tmp_path, repeats, warmup):
    """A B A B ...; the last output comes back, and as many times as rounds that count."""
    log = tmp_path / "log"
    builders = {name: (calls.logged, (name, str(log))) for name in "AB"}
    timings = time_in_turn(builders, CPU, 1, repeats, warmup)
    assert log.read_text() == "AB" * (repeats + warmup)
    assert list(timings) == ["A", "B"]
    for timing in timings.values():
        assert len(timing.runs_ms) == repeats
        assert timing.output.dtype == np.float32
        assert timing.output.tolist() == [repeats + warmup]
    assert_no_process_is_left()


def test_what_is_timed(calls, warm_processes):
    """A call's own time, to the one that it belongs to; the first round does not count."""
    builders = {"slow": (calls.sleeps, (5.0, 2.0, 0.5)), "fast": (calls.sleeps, ())}
    timings = time_in_turn(builders, CPU, 1, 2)
    first, second = timings["slow"].runs_ms
    assert 2000 <= first < 5000
    assert 500 <= second < 2000
    assert max(timings["fast"].runs_ms) < 1000


def test_processes_of_their_own(calls, warm_processes):
    builders = dict.fromkeys("AB", (calls.process, ()))
    outputs = [timing.output.tolist() for timing in time_in_turn(builders, CPU, 2, 1).values()]
    assert len({os.getpid(), *(pid for pid, _ in outputs)}) == 3
    assert [threads for _, threads in outputs] == [2, 2]


def test_peak_memory(calls, warm_processes):
    """Also of memory that was given back when the call returned."""
    size = 300_000_000
    builders = {"little": (calls.fills, (1,)), "much": (calls.fills, (size,))}
    timings = time_in_turn(builders, CPU, 1, 1)
    more = timings["much"].peak_memory_bytes - timings["little"].peak_memory_bytes
    assert 0.8 * size < more < 1.5 * size


def test_peak_memory_is_not_the_starting_process(calls):
    """A process starts as a copy of the one that starts it, whose peak is none of its own."""
    size = 1_200_000_000
    assert calls.fills(size)().item() == 1
    (timing,) = time_in_turn({"little": (calls.fills, (1,))}, CPU, 1, 1).values()
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
    ("builder", "arguments", "message"),
    [
        ("fails_to_build", (), "^bad: ValueError: no such model$"),
        ("fails", (), "^bad: IndexError: class 10 of 10$"),
        ("dies_building", (), "^bad: its process died"),
        ("dies", (), "^bad: its process died"),
        pytest.param("dies_while_others_run", (0.2,), "^bad: its process died"),
    ],
)
def test_a_process_that_fails(calls, warm_processes, builder, arguments, message):
    """It is named, and the others end with it."""
    builders = {"bad": (getattr(calls, builder), arguments), "good": (calls.sleeps, (1.0, 1.0))}
    with pytest.raises(RuntimeError, match=message):
        time_in_turn(builders, CPU, 1, 2)
    assert_no_process_is_left()
