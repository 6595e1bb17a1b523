"""Which compute path is the fastest, by a table that is measured on this machine and kept.

A path's time is taken as a line through its times at two densities of random masks. `reference` is
the dense FFN with what was not selected zeroed, so that nothing is ever much slower than dense.
On a GPU the host would wait for the density of the mask at hand: there a shape takes the path that
is fastest at the density ASSUMED.

The table is in `c_library.cache_folder()`. The same inputs take the same path as long as it is
there; where it cannot be written, as long as the process lives.
Legend: N tokens, C width, E experts, D neurons of an expert.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from dmoe_var.c_library import cache_folder, processor
from dmoe_var.devices import synchronise
from dmoe_var.files import alone, note, write_text
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.paths import FALLBACK, PLAIN, RAN, ComputePath, path, paths_on
from dmoe_var.moe.experts.weights import ExpertWeights
from dmoe_var.sampling_time import this_sampling

FORMAT = "dmoe-var-experts/1"
DENSITIES = (0.25, 1.0)
ASSUMED = 0.5
REPEATS = 3
"""Calls of which the fastest counts, after one that does not."""

Seconds = dict[str, tuple[float, float]]
"""By path, at each of DENSITIES."""
_tables: dict[Path, dict[str, Seconds]] = {}


def run(x_NC: Tensor, dispatch: Dispatch, weights: ExpertWeights, act: nn.Module) -> Tensor:
    """See `paths.ComputePath`."""
    name = fastest(x_NC, dispatch, weights, act)
    RAN[name] += 1
    return path(name).run(x_NC, dispatch, weights, act)


def fastest(x_NC: Tensor, dispatch: Dispatch, weights: ExpertWeights, act: nn.Module) -> str:
    """Name of the path to run: `grouped` for all that only plain paths can run."""
    device = x_NC.device
    there = paths_on(device).items()
    paths = {name: each for name, each in there if each.can_run(x_NC, weights, act)}
    *_, last = paths
    if last in PLAIN or dispatch.mask_NE.numel() == 0:
        return FALLBACK
    if device.type != "cuda":
        density = dispatch.density
    elif torch.cuda.is_current_stream_capturing():  # when nothing runs that could be timed
        return last
    else:
        density = ASSUMED
    seconds = _seconds(paths, x_NC, weights, act)
    return min(seconds, key=lambda name: _at(density, seconds[name]))


def _at(density: float, times: tuple[float, float]) -> float:
    """On the line through both times."""
    low, high = DENSITIES
    return times[0] + (times[1] - times[0]) * (density - low) / (high - low)


def _seconds(
    paths: Mapping[str, ComputePath], x_NC: Tensor, weights: ExpertWeights, act: nn.Module
) -> Seconds:
    """From the table, or measured now."""
    E, D, C = weights.w1_EDC.shape
    dtype = str(x_NC.dtype).removeprefix("torch.")
    if x_NC.is_cuda:
        products = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "exact"
    else:
        products = "torch" if this_sampling() is None else "sampling"
    names = ",".join(paths)
    key = f"{dtype} C={C} D={D} E={E} N={_rounded(len(x_NC))} {products} {names}"
    file = _file(x_NC.device)
    table = _tables.setdefault(file, {})
    if key not in table:
        table |= _read(file)
    if key not in table:
        table[key] = _measured(paths, x_NC, weights, act)
        _keep(file, key, table[key])
    return table[key]


def _rounded(tokens: int) -> int:
    """Down to a power of two or one and a half of one: what takes the same path."""
    power = 1 << (tokens.bit_length() - 1)
    return power + power // 2 if tokens >= power + power // 2 else power


def _measured(
    paths: Mapping[str, ComputePath], x_NC: Tensor, weights: ExpertWeights, act: nn.Module
) -> Seconds:
    generator = torch.Generator().manual_seed(0)
    draws_NE = torch.rand(len(x_NC), len(weights.w1_EDC), generator=generator)
    masks = [(draws_NE < density).to(x_NC.device) for density in DENSITIES]
    times: dict[str, list[list[float]]] = {name: [[] for _ in masks] for name in paths}
    for _ in range(1 + REPEATS):  # in turn: a machine that is busy for a while is so for all
        for name, each in paths.items():
            for mask_NE, found in zip(masks, times[name], strict=True):
                synchronise(x_NC.device)
                started = time.perf_counter()
                each.run(x_NC, Dispatch(mask_NE), weights, act)
                synchronise(x_NC.device)
                found.append(time.perf_counter() - started)
    return {name: (min(low[1:]), min(high[1:])) for name, (low, high) in times.items()}


def _file(device: torch.device) -> Path:
    """The table of this processor and number of threads, or of this GPU; of torch and kernels."""
    return cache_folder() / f"experts-{_machine(device, torch.get_num_threads())}.json"


@cache
def _machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        machine = [torch.cuda.get_device_name(device)]
    else:
        machine = [processor(), str(threads)]
    versions = [each.version() for each in paths_on(device).values()]
    text = "\0".join((torch.__version__, *machine, *versions))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, Seconds]:
    """Nothing where the file is missing or broken: it is measured again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return {}
        return {
            str(key): {str(name): (float(low), float(high)) for name, (low, high) in times.items()}
            for key, times in content["seconds"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _keep(file: Path, key: str, seconds: Seconds) -> None:
    """Beside what other processes have measured meanwhile; the first who measures counts."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone(file.parent):
            found = _read(file)
            seconds.update(found.get(key, {}))
            text = json.dumps({"format": FORMAT, "seconds": found | {key: seconds}}, indent=1)
            write_text(file, text + "\n")
    except OSError as error:
        note(f"{file}: cannot be kept ({error.strerror}); each process measures the paths anew")
