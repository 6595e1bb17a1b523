"""The time within which a thread samples images: what holds during it, and what is checked when it
ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from dmoe_var.errors import InputError

Check = tuple[Tensor, str]
"""A truth value on any device, and what to say if it is false."""


class Sampling:
    """Stands for one `sampling` block; while it lasts nobody writes to a weight."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.settled: dict[Any, Any] = {}
        """What a layer has settled for the rest of the block, see `moe.at_once`."""

    def check_at_end(self, holds: Tensor, otherwise: str) -> None:
        """Raise InputError(otherwise) at the end of the block unless `holds`, a truth value on any
        device. The host waits for the device only then."""
        self.checks.append((holds, otherwise))

    def end(self) -> None:
        """Raise InputError for the first check that does not hold."""
        if self.checks:
            held = torch.stack([holds for holds, _ in self.checks]).cpu()
            for holds, (_, otherwise) in zip(held.tolist(), self.checks, strict=True):
                if not holds:
                    raise InputError(otherwise)


_SAMPLING: ContextVar[Sampling | None] = ContextVar("sampling", default=None)


@contextmanager
def sampling() -> Iterator[None]:
    """Mark that this thread samples images: there are no gradients, and the fastest products run.
    Unlike inference mode's, its tensors are plain ones: others may train through them."""
    this = Sampling()
    outside = _SAMPLING.set(this)
    try:
        with torch.no_grad():
            yield
            this.end()
    finally:
        _SAMPLING.reset(outside)


def this_sampling() -> Sampling | None:
    """Return the `sampling` block that this thread is in; None outside of one."""
    return _SAMPLING.get()
