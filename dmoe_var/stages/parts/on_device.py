"""Refuse, before any work, what a stage that samples asks of a device that cannot do it."""

from __future__ import annotations

from dmoe_var.config.root import Config
from dmoe_var.devices import chosen_device
from dmoe_var.models.int8 import check_int8
from dmoe_var.moe.experts import check_runs_on


def check_sampling(config: Config, experts: bool = True) -> None:
    """Raise InputError for 8 bits, CUDA graphs and, if experts run, a compute path that are not to
    be had here."""
    check_int8(config.sampling.int8)
    device = chosen_device(config.device)
    config.sampling.new_graphs(device)
    if experts:
        check_runs_on(config.moe.impl, device)
