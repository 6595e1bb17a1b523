"""Timing a call on a device."""

from __future__ import annotations

import torch

from dmoe_var import devices


def test_on_a_gpu_calls_run_in_a_row_between_two_waits(monkeypatch):
    done, clock = [], iter([10.0, 14.0])
    monkeypatch.setattr(devices, "synchronise", lambda device: done.append("wait"))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    seconds = devices.seconds_of(lambda: done.append("call"), torch.device("cuda"))
    assert done == ["wait", *["call"] * devices.IN_A_ROW, "wait"]
    assert seconds == 4.0 / devices.IN_A_ROW


def test_on_a_cpu_one_call_counts(monkeypatch):
    done, clock = [], iter([10.0, 14.0])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    assert devices.seconds_of(lambda: done.append("call"), torch.device("cpu")) == 4.0
    assert done == ["call"]
