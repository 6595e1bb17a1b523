"""Random generators of a device. All of the library's are made here, so that whoever plays a device
that is not there (tests/cuda_dry_run.py) can play its generators too."""

from __future__ import annotations

import torch


def seeded(device: torch.device | str, seed: int) -> torch.Generator:
    """A new generator of a device."""
    return torch.Generator(device).manual_seed(seed)
