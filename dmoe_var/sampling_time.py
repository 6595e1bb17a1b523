"""The time within which a thread draws images: what holds during it, and what is checked once, when
it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from dmoe_var.errors import InputError


class Sampling:
    """One time within `sampling`: as long as it lasts nobody writes to a weight."""

    def __init__(self) -> None:
        self._checks: list[tuple[Tensor, str]] = []

    def check_at_end(self, holds: Tensor, otherwise: str) -> None:
        """InputError(otherwise) at the end of this time unless `holds`, a truth value on whatever
        device: it is waited for once, then."""
        self._checks.append((holds, otherwise))

    def end(self) -> None:
        """InputError for the first check that does not hold."""
        if self._checks:
            held = torch.stack([holds for holds, _ in self._checks]).cpu()
            for holds, (_, otherwise) in zip(held.tolist(), self._checks, strict=True):
                if not holds:
                    raise InputError(otherwise)


_SAMPLING: ContextVar[Sampling | None] = ContextVar("sampling", default=None)


@contextmanager
def sampling() -> Iterator[None]:
    """Within it this thread draws images: no gradients, and the products that are fastest there.
    Its tensors are plain ones, which inference mode's are not: others may train through them."""
    this = Sampling()
    outside = _SAMPLING.set(this)
    try:
        with torch.no_grad():
            yield
            this.end()
    finally:
        _SAMPLING.reset(outside)


def this_sampling() -> Sampling | None:
    """What this thread is within; None outside of `sampling`."""
    return _SAMPLING.get()
