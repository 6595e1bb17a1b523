"""Devices: which one runs, what it is called, its memory, and how to wait for it."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dmoe_var.distributed import launched_processes, local_rank
from dmoe_var.errors import InputError


def synchronise(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


IN_A_ROW = 16
"""Calls between two waits for a GPU while one of them is timed."""


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Time a call, in seconds. On a GPU several run in a row, as layers do while sampling: the host
    starts one while the GPU works on those before it, and the longer of the two counts."""
    calls = IN_A_ROW if device.type == "cuda" else 1
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - started) / calls


def chosen_device(name: str) -> torch.device:
    """Return the device that a configuration names; "auto" takes CUDA, then MPS, then the CPU.
    Raises InputError if this machine lacks it, or if several processes cannot share it."""
    kind, _, number = name.partition(":")
    processes = launched_processes()
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(each for each in has if has[each])
    if not has[kind]:
        raise InputError(
            f"device={name}: this machine has no {kind.upper()} device; allowed: auto, cpu"
        )
    if kind == "mps" and processes > 1:
        raise InputError(f"device={name}: one process alone; several may share device=cpu")
    if number and processes > 1:
        raise InputError(f"device={name}: torchrun gives each process its own; allowed: auto, cuda")
    if kind != "cuda":
        return torch.device(kind)
    count, index = torch.cuda.device_count(), int(number) if number else local_rank()
    if index >= count and number:
        raise InputError(f"device={name}: allowed: cuda:0 to cuda:{count - 1}")
    if index >= count:
        raise InputError(
            f"torchrun started {processes} processes; allowed: {count}, one a GPU of this machine"
        )
    return torch.device("cuda", index)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of the device's allocator on CUDA, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # on Linux children inherit getrusage's peak; VmHWM starts anew with each program
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def device_name(device: torch.device) -> str:
    """Name a device in words: a processor by its model if the system tells it, else by its
    architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.processor() or platform.machine()} CPU"
