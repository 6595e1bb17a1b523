"""Time samplers side by side: in turn, each in a process of its own, without the first calls.

A process of its own gives each its own peak of memory, and keeps what one library changes in torch
away from the other.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmoe_var.devices import peak_memory, synchronise
from dmoe_var.metrics.part_timing import PartClock, PartTimes

Call = Callable[..., Tensor]
"""Does what is timed; what it returns is compared. One whose parts are timed takes a PartClock."""


@dataclass(frozen=True)
class Timing:
    """Wall time of a call in milliseconds, one value per run, and the process's peak memory."""

    runs_ms: tuple[float, ...]
    peak_memory_bytes: int
    output: np.ndarray
    """What the last call returned, float32."""
    parts: tuple[PartTimes, ...] = ()
    """Times of further calls, one value per run, under a clock that costs time itself."""

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.runs_ms, q))

    def metrics(self, name: str) -> dict[str, float]:
        """Return median, 10th and 90th percentile, fastest run, peak memory; flat, for a record."""
        return {
            f"{name}_ms_median": self.percentile(50),
            f"{name}_ms_p10": self.percentile(10),
            f"{name}_ms_p90": self.percentile(90),
            f"{name}_ms_min": min(self.runs_ms),
            f"{name}_peak_memory_mb": self.peak_memory_bytes / 1e6,
        }


def time_in_turn(
    builders: Mapping[str, tuple[Callable[..., Call], tuple[Any, ...]]],
    device: torch.device,
    threads: int,
    repeats: int,
    warmup: int = 1,
    progress: bool = False,
    by_part: Collection[str] = (),
) -> dict[str, Timing]:
    """Time calls A B A B ..., after `warmup` rounds that do not count.

    builders: by name, a module's function, which builds the call in its process, and its arguments.
    by_part: names of calls that then run as often again, in turn, for the times of their parts.
    Raise RuntimeError, with what it said, if a process fails.
    """
    context = mp.get_context("spawn")
    flags = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    with ExitStack() as stack:
        # Start the processes
        workers = {}
        for name, (build, arguments) in builders.items():
            ours, theirs = context.Pipe()
            given = (theirs, device, threads, flags, build, arguments)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.terminate)
            workers[name] = ours
        for name, worker in workers.items():
            _ask(name, worker)
        # Time whole calls
        runs: dict[str, list[float]] = {name: [] for name in workers}
        for round_ in tqdm(range(warmup + repeats), desc="benchmark", disable=not progress):
            for name, worker in workers.items():
                milliseconds = _ask(name, worker, "run")
                if round_ >= warmup:
                    runs[name].append(milliseconds)
        reports = {name: _ask(name, worker, "report") for name, worker in workers.items()}
        # Time their parts
        parts: dict[str, list[PartTimes]] = {name: [] for name in workers}
        for _ in tqdm(range(repeats), desc="by part", disable=not (progress and by_part)):
            for name in by_part:
                parts[name].append(_ask(name, workers[name], "parts"))
    return {
        name: Timing(tuple(runs[name]), peak, output, tuple(parts[name]))
        for name, (peak, output) in reports.items()
    }


def _ask(name: str, worker: Connection, what: str | None = None) -> Any:
    """Ask a process to do something, if it is told what, and wait for its answer."""
    try:
        if what is not None:
            worker.send(what)
        kind, value = worker.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError(f"{name}: its process died (out of memory?)") from error
    if kind == "error":
        raise RuntimeError(f"{name}: {value}")
    return value


def _serve(
    pipe: Connection,
    device: torch.device,
    threads: int,
    flags: tuple[bool, bool, bool],
    build: Callable[..., Call],
    arguments: tuple[Any, ...],
) -> None:
    """Serve in a process: take over `flags`, build its call, then run it as often as it is told."""
    try:
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags[:2]
        if flags[2]:  # not called without need: it imports the compiler, which takes seconds
            torch.use_deterministic_algorithms(True)
        call = build(*arguments)
        pipe.send(("ready", None))
        output = torch.empty(0)
        while True:
            what = pipe.recv()
            if what == "parts":
                clock = PartClock(device)
                synchronise(device)
                call(clock)
                pipe.send(("parts", clock.read()))
            elif what == "run":
                synchronise(device)
                started = time.perf_counter()
                output = call()
                synchronise(device)
                pipe.send(("ms", 1000 * (time.perf_counter() - started)))
            else:
                pipe.send(("report", (peak_memory(device), output.float().cpu().numpy())))
    except EOFError:
        return
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
