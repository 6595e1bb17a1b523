"""Make random generators. All of the library's are made here, so that whoever plays a missing
device (tests/cuda_dry_run.py) can play its generators too."""

from __future__ import annotations

import torch


def seeded(device: torch.device | str, seed: int) -> torch.Generator:
    """Make a generator on a device, with a seed."""
    return torch.Generator(device).manual_seed(seed)
