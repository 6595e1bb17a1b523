"""Watching a model: what an observer is shown while images are sampled, or under teacher forcing.

Legend: B rows of the transformer's batch (with guidance the conditional ones first), b those rows
that select experts (B, or B / sharing), L tokens of a scale, C width, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from dmoe_var.moe.kept import Kept


class Routed(NamedTuple):
    """Tells what an expert FFN has done at a scale."""

    si: int
    layer: int
    ffn: nn.Module
    """The `MoEFFN`."""
    x_BLC: Tensor
    """The input of the FFN."""
    scores_bLE: Tensor | None
    """The scores that experts were selected by; None if the rule reads no scores."""
    mask_BLE: Tensor
    """Which experts ran."""
    kept: Kept | None = None
    """Where the L tokens lie, if others were skipped; None is all of the scale, in order."""


class Observer:
    """Sees nothing; a subclass overrides what it wants to see. It changes nothing that it sees."""

    def on_part(self, part: str, si: int | None) -> None:
        """A part of the sampler begins (see `metrics.part_timing.PARTS`), at scale si, or outside
        of all scales if si is None."""

    def on_scale(self, si: int, f_hat_BCHW: Tensor) -> None:
        """Scale si has been drawn; f_hat_BCHW is the sum of the code maps so far."""

    def on_routing(self, routed: Routed) -> None:
        """The experts of a layer have run; layers come in order."""

    def in_layers(self) -> Observer | None:
        """Return the observer of what happens within the transformer: `on_routing`, and the parts
        of an expert FFN. If None, no layer calls anything."""
        return self


class _Several(Observer):
    """Passes all that it sees to several observers."""

    def __init__(self, observers: tuple[Observer, ...]):
        self._observers = observers

    def on_part(self, part: str, si: int | None) -> None:
        for each in self._observers:
            each.on_part(part, si)

    def on_scale(self, si: int, f_hat_BCHW: Tensor) -> None:
        for each in self._observers:
            each.on_scale(si, f_hat_BCHW)

    def on_routing(self, routed: Routed) -> None:
        for each in self._observers:
            each.on_routing(routed)

    def in_layers(self) -> Observer | None:
        return joined(*(each.in_layers() for each in self._observers))


def joined(*observers: Observer | None) -> Observer | None:
    """Join several observers into one, which are shown everything in this order; None if none."""
    given = tuple(each for each in observers if each is not None)
    return _Several(given) if len(given) > 1 else next(iter(given), None)
