"""Builders of calls for `time_in_turn`, which its processes import."""

from __future__ import annotations

import os
import threading
import time
from itertools import count

import torch


def logged(name, log):
    """Adds its name to a file; returns how often it was called, in float64."""
    calls = count(1)

    def call():
        with open(log, "a") as file:
            file.write(name)
        return torch.tensor([next(calls)], dtype=torch.float64)

    return call


def sleeps(*seconds):
    """Takes those seconds, call by call; then no time."""
    durations = iter(seconds)

    def call():
        time.sleep(next(durations, 0))
        return torch.zeros(1)

    return call


def process():
    """Returns the number of its process and of its threads."""
    return lambda: torch.tensor([os.getpid(), torch.get_num_threads()])


def fills(num_bytes):
    """Fills that much memory with ones for a moment."""
    return lambda: torch.ones(num_bytes, dtype=torch.uint8)[:1].clone()


def fails_to_build():
    raise ValueError("no such model")


def fails():
    def call():
        raise IndexError("class 10 of 10")

    return call


def dies_building():
    os._exit(1)


def dies():
    return lambda: os._exit(1)


def dies_while_others_run(seconds):
    """Its process ends that long after its first call returned."""

    def call():
        threading.Timer(seconds, os._exit, [1]).start()
        return torch.zeros(1)

    return call
