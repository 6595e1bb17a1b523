"""Run the fastest compute path, by a table that is measured on this machine and kept.

A path's time follows lines between its times at three densities of random masks, and is another one
where every expert runs. `reference` runs the whole dense FFN and zeroes what was not selected, so
nothing is ever much slower than dense.
On a GPU the host would have to wait for the mask's density. There a shape takes the path that is
fastest at the density ASSUMED, of those for which the host does not wait either. A time there holds
the launches, of which a CUDA graph needs none: it takes the same path all the same.

The table is in `c_library.cache_folder()`; a process reads it once for each case that it meets. The
same inputs take the same path as long as the table is there, or as long as the process lives if it
cannot be written.
Legend: N tokens, C width, E experts, D neurons per expert.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmoe_var.c_library import cache_folder, processor
from dmoe_var.devices import seconds_of
from dmoe_var.files import alone, note, write_text
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.paths import PLAIN, RAN, ComputePath, fallback, path, paths_on
from dmoe_var.moe.experts.weights import ExpertWeights
from dmoe_var.sampling_time import this_sampling

FORMAT = "dmoe-var-experts/3"
DENSITIES = (0.15, 0.5, 1.0)
"""Of the masks that are timed; of the last one a single pair does not run, since a path may know a
shorter way where all do."""
ASSUMED = 0.5  # instead of a mask's density on a GPU
REPEATS, LONG_ENOUGH = 3, 0.05
"""Fewest timed rounds, and seconds for which they go on; the fastest counts. One before them warms
up."""

Seconds = dict[str, Sequence[float]]
"""The seconds of each path at each of DENSITIES, and where every expert runs."""
known: dict[tuple[Any, ...], Any] = {}
"""What this process has looked up or measured: seconds, by device, threads, paths and shape, and
what `moe.at_once` found by them."""
_apart = False


@contextmanager
def apart() -> Iterator[None]:
    """Measure anew within the block, and leave the table alone: for layers that are no model's, of
    whose hidden values other shares are 0."""
    global _apart
    outside, before = known.copy(), _apart
    known.clear()
    _apart = True
    try:
        yield
    finally:
        _apart = before
        known.clear()
        known.update(outside)


def run(x_NC: Tensor, dispatch: Dispatch, weights: ExpertWeights, act: nn.Module) -> Tensor:
    """See `paths.ComputePath`."""
    return run_known(by_density(x_NC, weights, act), x_NC, dispatch, weights, act)


def run_known(
    found: str | Seconds, x_NC: Tensor, dispatch: Dispatch, weights: ExpertWeights, act: nn.Module
) -> Tensor:
    """Do what `run` does, where it is known what `by_density` has found."""
    name = found if isinstance(found, str) else _best(dispatch.density, found)
    RAN[name] += 1
    return path(name).run(x_NC, dispatch, weights, act)


def by_density(x_NC: Tensor, weights: ExpertWeights, act: nn.Module) -> str | Seconds:
    """Return the name of the path to run whatever the mask; the times of all if that depends on how
    much of it runs. It is `fallback`'s if only plain paths can run the tensors."""
    device = x_NC.device
    on_gpu = device.type == "cuda"
    paths = {
        name: each
        for name, each in paths_on(device).items()
        if not (on_gpu and each.waits) and each.can_run(x_NC, weights, act)
    }
    last = next(reversed(paths))
    if last in PLAIN or len(x_NC) == 0:
        return fallback(device)
    if on_gpu and torch.cuda.is_current_stream_capturing():  # when nothing runs that could be timed
        seen = known.get(_case(paths, x_NC, weights))
        return last if seen is None else _best(ASSUMED, seen)
    seconds = _seconds(paths, x_NC, weights, act)
    if on_gpu:
        return _best(ASSUMED, seconds)
    # Between densities times are lines: the best at all of them always is
    best = {_best_of_lines(density, seconds) for density in (0, *DENSITIES)}
    best.add(_best(1, seconds))
    return seconds if len(best) > 1 else best.pop()


def _best(density: float, seconds: Seconds) -> str:
    """Return the path that is fastest at a density."""
    if density == 1:
        return min(seconds, key=lambda name: seconds[name][-1])
    return _best_of_lines(density, seconds)


def _best_of_lines(density: float, seconds: Seconds) -> str:
    """Return the path that is fastest at a density, if not all run."""
    return min(seconds, key=lambda name: _at(density, seconds[name]))


def _at(density: float, times: Sequence[float]) -> float:
    """Return the time at a density, on the line through the measured times next to it."""
    place = bisect(DENSITIES[1:-1], density)
    (low, high), (before, after) = DENSITIES[place : place + 2], times[place : place + 2]
    return before + (after - before) * (density - low) / (high - low)


def _case(
    paths: Mapping[str, ComputePath], x_NC: Tensor, weights: ExpertWeights
) -> tuple[Any, ...]:
    """Say what the times depend on."""
    if x_NC.is_cuda:
        products = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "exact"
    else:
        products = "torch" if this_sampling() is None else "sampling"
    shape, tokens = weights.w1_EDC.shape, _rounded(len(x_NC))
    return (x_NC.device, torch.get_num_threads(), x_NC.dtype, shape, tokens, products, *paths)


def _seconds(
    paths: Mapping[str, ComputePath], x_NC: Tensor, weights: ExpertWeights, act: nn.Module
) -> Seconds:
    """Return the times of this case: known already, or from the table, or measured now."""
    case = _case(paths, x_NC, weights)
    if case not in known:
        _, _, dtype, (E, D, C), tokens, products, *names = case
        key = f"{str(dtype).removeprefix('torch.')} C={C} D={D} E={E} N={tokens} {products} "
        key += ",".join(names)
        file = None if _apart else _file(x_NC.device)
        found = {} if file is None else _read(file).get(key, {})
        if found.keys() != paths.keys():
            found = _measured(paths, x_NC, weights, act)
            if file is not None:
                _keep(file, key, found)
        known[case] = found
    return known[case]


def _rounded(tokens: int) -> int:
    """Round down to 2^n or 1.5 * 2^n; numbers that round alike take the same path."""
    power = 1 << (tokens.bit_length() - 1)
    return power + power // 2 if tokens >= power + power // 2 else power


def _measured(
    paths: Mapping[str, ComputePath], x_NC: Tensor, weights: ExpertWeights, act: nn.Module
) -> Seconds:
    generator = torch.Generator().manual_seed(0)
    draws_NE = torch.rand(len(x_NC), len(weights.w1_EDC), generator=generator)
    drawn = [draws_NE < density for density in (*DENSITIES, 1)]
    if draws_NE.numel() > 1:
        drawn[-2][-1, -1] = False
    masks = [mask_NE.to(x_NC.device) for mask_NE in drawn]
    times: dict[str, list[list[float]]] = {name: [[] for _ in masks] for name in paths}

    def take_turns() -> None:
        # So that a busy spell slows all paths, and all find cold caches
        for place, mask_NE in enumerate(masks):
            for name, each in paths.items():
                run = lambda: each.run(x_NC, _counted(mask_NE), weights, act)  # noqa: B023, E731
                times[name][place].append(seconds_of(run, x_NC.device))

    take_turns()  # which packs weights
    started, rounds = time.perf_counter(), 0
    while rounds < REPEATS or time.perf_counter() - started < LONG_ENOUGH:
        take_turns()
        rounds += 1
    return {name: tuple(min(of_mask[1:]) for of_mask in found) for name, found in times.items()}


def _counted(mask_NE: Tensor) -> Dispatch:
    """Derive anew from a mask what was known of it when its path was chosen."""
    dispatch = Dispatch(mask_NE)
    if not mask_NE.is_cuda:
        _ = dispatch.density
    return dispatch


def _file(device: torch.device) -> Path | None:
    """Name the table of this processor and thread count, or GPU, and of these code versions; None
    if there is no folder for it."""
    if device.type == "cuda":
        machine = [torch.cuda.get_device_name(device)]
    else:
        machine = [processor(), str(torch.get_num_threads())]
    versions = [each.version() for each in paths_on(device).values()]
    text = "\0".join((torch.__version__, *machine, *versions))
    name = f"experts-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    try:
        return cache_folder() / name
    except FileNotFoundError as error:
        _cannot_keep(error.filename, error)
        return None


def _read(file: Path) -> dict[str, Seconds]:
    """Read a table; a missing or broken file gives an empty one, and all is measured again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return {}
        return {
            str(key): {
                str(name): (float(few), float(half), float(most), float(every))
                for name, (few, half, most, every) in times.items()
            }
            for key, times in content["seconds"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _keep(file: Path, key: str, seconds: Seconds) -> None:
    """Store times beside those of other processes; the first process to store a key wins."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone(file.parent):
            found = _read(file)
            seconds.update(found.get(key, {}))
            text = json.dumps({"format": FORMAT, "seconds": found | {key: seconds}}, indent=1)
            write_text(file, text + "\n")
    except OSError as error:
        _cannot_keep(file, error)


def _cannot_keep(file: Path | str, error: OSError) -> None:
    note(f"{file}: cannot be kept ({error.strerror}); each process measures the paths anew")
