"""The compute paths by name. Each is a file in this folder, loaded at its first use.

Legend: N tokens, C width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.weights import ExpertWeights

Impl = Literal["auto", "reference", "grouped", "native", "triton"]
"""The one list of names, which are those of the files. If nothing can be timed, `auto` takes the
last one that can run."""
IMPLEMENTATIONS: tuple[str, ...] = get_args(Impl)
AUTO = "auto"
"""Runs the path that is fastest on this machine."""
PATHS = tuple(name for name in IMPLEMENTATIONS if name != AUTO)
FALLBACK, ON_GPU = "grouped", "reference"
"""Run what the path that was asked for cannot, see `fallback`."""
PLAIN = (ON_GPU, FALLBACK)
"""Paths that need no kernel: they run on any device, with any activation, and with gradients."""

RAN: Counter[str] = Counter()
"""Calls of each path in this process, counted for the path that ran in the end."""


def fallback(device: torch.device) -> str:
    """Name the path that runs what another cannot. On a GPU the host must not wait in it."""
    return ON_GPU if device.type == "cuda" else FALLBACK


@dataclass(frozen=True)
class ComputePath:
    """Lists what a path's file defines, by these names; all but `run` may be left out."""

    run: Callable[[Tensor, Dispatch, ExpertWeights, nn.Module], Tensor]
    """(x_NC, dispatch, weights, act) -> sum over the selected experts plus b2, (N, C)."""
    can_run: Callable[[Tensor, ExpertWeights, nn.Module], bool] = lambda *given: True
    """Whether it takes these tokens, experts and activation; if not, `grouped` runs them. Raises
    InputError if the path can run nothing at all here and the user should know."""
    missing: Callable[[torch.device], str | None] = lambda device: None
    """Why it can run nothing at all on a device, in one line; None if it can."""
    runs_on: Callable[[torch.device], bool] = lambda device: True
    """Whether `auto` and benchmarks try it on a device."""
    waits: bool = False
    """Whether the host waits for a GPU while it runs. `auto` leaves it out there."""
    version: Callable[[], str] = str
    """What its speed depends on besides this machine and torch: its sources and packages. If it is
    left out it is the path's file."""


_loaded: dict[str, ComputePath] = {}


def path(name: str) -> ComputePath:
    """Load a path, one of IMPLEMENTATIONS, once."""
    if name not in _loaded:
        module = import_module(f"dmoe_var.moe.experts.{name}")
        names = [field.name for field in fields(ComputePath) if hasattr(module, field.name)]
        source = partial(Path(str(module.__file__)).read_text, "utf-8")
        given = {"version": source} | {name: getattr(module, name) for name in names}
        _loaded[name] = ComputePath(**given)
    return _loaded[name]


def paths_on(device: torch.device) -> dict[str, ComputePath]:
    """Load those of PATHS that run on a device."""
    return {name: each for name in PATHS if (each := path(name)).runs_on(device)}
