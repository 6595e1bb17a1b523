"""The compute paths by name. Each is a file of this folder, which is loaded when it is first used.

Legend: N tokens, C width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.weights import ExpertWeights

Impl = Literal["auto", "reference", "grouped", "native", "triton"]
"""The one list of names, which are those of the files. Among several that can run, `auto` takes the
last where nothing can be timed."""
IMPLEMENTATIONS: tuple[str, ...] = get_args(Impl)
AUTO = "auto"
"""Runs the one of the others that is fastest on this machine."""
PATHS = tuple(name for name in IMPLEMENTATIONS if name != AUTO)
FALLBACK = "grouped"
"""Runs what another path cannot."""
PLAIN = ("reference", FALLBACK)
"""Made of torch's operators: they run on any device, with any activation, and with gradients."""

RAN: Counter[str] = Counter()
"""Calls of each path in this process: what `auto` chose, and what ran in the place of another."""


@dataclass(frozen=True)
class ComputePath:
    """What a path's file defines, by these names; all but `run` may be left out."""

    run: Callable[[Tensor, Dispatch, ExpertWeights, nn.Module], Tensor]
    """(x_NC, dispatch, weights, act) -> sum over the selected experts plus b2, (N, C)."""
    can_run: Callable[[Tensor, ExpertWeights, nn.Module], bool] = lambda *given: True
    """Whether it knows such tokens, experts and activation; `grouped` runs them if not. InputError
    where it can run nothing at all and that is not to go unnoticed."""
    runs_on: Callable[[torch.device], bool] = lambda device: True
    """Whether `auto` and benchmarks try it on a device."""
    version: Callable[[], str] = str
    """What its speed depends on beside this machine and torch: its sources, its packages."""


_loaded: dict[str, ComputePath] = {}


def path(name: str) -> ComputePath:
    """One of IMPLEMENTATIONS."""
    if name not in _loaded:
        module = import_module(f"dmoe_var.moe.experts.{name}")
        names = [field.name for field in fields(ComputePath) if hasattr(module, field.name)]
        _loaded[name] = ComputePath(**{name: getattr(module, name) for name in names})
    return _loaded[name]


def paths_on(device: torch.device) -> dict[str, ComputePath]:
    """Those of PATHS that a device is there for."""
    paths = {name: path(name) for name in PATHS}
    return {name: each for name, each in paths.items() if each.runs_on(device)}
