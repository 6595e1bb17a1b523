"""Builders of calls for `time_in_turn`, which its processes import."""

from __future__ import annotations

import os
import threading
import time
from itertools import count

import torch


def watched(name, log, seconds, num_bytes):
    """Adds its name to a file, takes those seconds, call by call (then no time), and fills memory
    for a moment. Returns the numbers of its calls, process and threads, in float64."""
    calls, durations = count(1), iter(seconds)

    def call():
        with open(log, "a") as file:
            file.write(name)
        time.sleep(next(durations, 0))
        torch.ones(num_bytes, dtype=torch.uint8)
        numbers = [next(calls), os.getpid(), torch.get_num_threads()]
        return torch.tensor(numbers, dtype=torch.float64)

    return call


def idle():
    return lambda: torch.zeros(1)


def fails_to_build():
    raise ValueError("no such model")


def dies():
    return lambda: os._exit(1)


def dies_while_others_run():
    """Its process ends soon after its first call returned."""

    def call():
        threading.Timer(0.2, os._exit, [1]).start()
        return torch.zeros(1)

    return call
