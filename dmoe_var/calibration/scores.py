"""Find what each tau runs, from router scores that were recorded once.

Legend: B images, l tokens of a scale, E experts, G = BINS + 1 edges from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.moe.observer import Observer, Routed
from dmoe_var.moe.selection import SelectionRule, Threshold, check_finite

BINS = 4096
"""Steps of tau that are told apart."""

Cell = tuple[int, int]
"""(scale, layer)."""
ROUTERS = Threshold(0.0)
"""Reads the routers' scores, and runs every expert."""
Batches = Iterable[tuple[Tensor, Tensor]]
"""Labels (B,) and teacher input (B, L - 1, Cvae)."""


@dataclass(frozen=True)
class Tails:
    """Density and drop of one cell over edges tau_G. Experts run if their score is at least tau
    times their token's largest; the squared scores of the others are dropped, summed per token."""

    density_G: npt.NDArray[np.float64]
    dropped_G: npt.NDArray[np.float64]

    def density(self, tau: float) -> float:
        return float(np.interp(tau, EDGES_G, self.density_G))

    def dropped(self, tau: float) -> float:
        return float(np.interp(tau, EDGES_G, self.dropped_G))

    def tau(self, density: float) -> float:
        """Find the smallest tau that runs at most this density; 1 if none does."""
        if density >= self.density_G[0]:
            return 0.0
        if density < self.density_G[-1]:
            return 1.0
        last = int(np.argmax(self.density_G <= density))
        high, low = self.density_G[last - 1], self.density_G[last]
        part = (high - density) / (high - low) if high > low else 1.0
        return float(EDGES_G[last - 1] + part * (EDGES_G[last] - EDGES_G[last - 1]))


EDGES_G: npt.NDArray[np.float64] = np.linspace(0, 1, BINS + 1)


@dataclass
class _Sums:
    """Sums of one cell, by bin of score over the token's largest: experts, and squared scores."""

    count_G: Tensor = field(default_factory=lambda: torch.zeros(BINS + 1, dtype=torch.float64))
    energy_G: Tensor = field(default_factory=lambda: torch.zeros(BINS + 1, dtype=torch.float64))
    tokens: int = 0

    def add(self, scores_BlE: Tensor) -> None:
        scores = scores_BlE.cpu().double()
        largest = scores.amax(-1, keepdim=True)
        # A token whose scores are all 0 runs every expert at any tau, as Eq. 3 has it.
        ratio = torch.where(largest > 0, scores / largest.clamp_min(1e-300), 1.0)
        bins = (ratio * BINS).long().flatten()
        self.count_G += torch.bincount(bins, minlength=BINS + 1)
        self.energy_G += torch.bincount(bins, scores.square().flatten(), minlength=BINS + 1)
        self.tokens += ratio[..., 0].numel()

    def tails(self) -> Tails:
        count, energy = self.count_G.numpy(), self.energy_G.numpy()
        below, dropped = (np.cumsum([0.0, *sums[:-1]]) for sums in (count, energy))
        return Tails(1 - below / count.sum(), dropped / self.tokens)


class Recorder(Observer):
    """Notes the scores of every cell of a model that runs under rules which read them."""

    def __init__(self, model: DynamicVAR):
        layers = range(model.config.depth)
        self._sums = {si: {layer: _Sums() for layer in layers} for si in model.moe_scales}

    def on_routing(self, routed: Routed) -> None:
        scores_BlE = routed.scores_bLE
        assert scores_BlE is not None
        check_finite(scores_BlE)
        self._sums[routed.si][routed.layer].add(scores_BlE)

    def tails(self) -> dict[Cell, Tails]:
        """Turn all scores so far into tails."""
        return {(si, i): cell.tails() for si, of in self._sums.items() for i, cell in of.items()}


def record_scores(
    model: DynamicVAR, batches: Batches, rule: SelectionRule = ROUTERS
) -> dict[Cell, Tails]:
    """Find tails of every cell of `model.moe_scales`, by teacher-forced passes with every expert.
    rule: it reads the scores that are meant (`Oracle(0.0)`: true norms), and runs every expert.

    Each batch runs with its labels and with the null class, as at inference half of the tokens are
    of either kind.
    """
    recorder = Recorder(model)
    for labels_B, teacher_BLC in batches:
        for labels in (labels_B, torch.full_like(labels_B, model.config.num_classes)):
            model(labels, teacher_BLC, selection=rule, observer=recorder)
    return recorder.tails()
