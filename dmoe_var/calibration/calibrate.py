"""Find tau for a budget: from recorded scores and loss curves to one tau per group.

Legend: a group is what one tau governs: a sparse scale or, by layer, a cell (scale, layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from dmoe_var.calibration.allocation import LossCurve, allocate
from dmoe_var.calibration.scores import Cell, Tails
from dmoe_var.metrics.flops import GIGA, SAMPLER_PARTS
from dmoe_var.metrics.flops_fixed import FixedCost
from dmoe_var.moe.selection import LayerThreshold, SelectionRule, Threshold

Group = tuple[int, ...]
"""(scale,) or (scale, layer)."""
Taus = Mapping[Group, float]


@dataclass(frozen=True)
class Plan:
    """What an image costs, and the scores that say what each tau runs. They come first from
    teacher-forced training images, then from images sampled under about the tau looked for."""

    fixed: FixedCost
    tails: Mapping[Group, Tails]
    num_layers: int

    @classmethod
    def of(cls, fixed: FixedCost, cells: Mapping[Cell, Tails], by_layer: bool) -> Plan:
        """Group recorded cells by scale, or by scale and layer."""
        layers = 1 + max(layer for _, layer in cells)
        if by_layer:
            return cls(fixed, {(si, i): each for (si, i), each in cells.items()}, layers)
        groups: dict[Group, Tails] = {}
        for si in sorted({si for si, _ in cells}):
            groups[si,] = _joined([cells[si, i] for i in range(layers)])
        return cls(fixed, groups, layers)

    @property
    def scales(self) -> list[int]:
        return sorted({group[0] for group in self.tails})

    @property
    def base_gmac(self) -> float:
        """GMAC of all but the experts that are chosen among; the routers are in it."""
        macs = sum(sum(self.fixed.macs.get(part, ())) for part in SAMPLER_PARTS)
        return (macs + sum(self.fixed.experts[si].router_macs for si in self.scales)) / GIGA

    def full_gmac(self, group: Group) -> float:
        """Count the GMAC of a group with every expert on."""
        cost = self.fixed.experts[group[0]]
        share = 1 if len(group) == 1 else 1 / self.num_layers
        return share * cost.num_pairs * cost.pair_macs / GIGA

    def density(self, group: Group, tau: float) -> float:
        """Look up the density of a group, the share of its experts that run."""
        return self.tails[group].density(tau)

    def scale_densities(self, taus: Taus) -> dict[int, float]:
        """Look up the density of each scale, the mean over its groups."""
        of_scale = {si: [group for group in taus if group[0] == si] for si in self.scales}
        return {
            si: fmean(self.density(group, taus[group]) for group in groups)
            for si, groups in of_scale.items()
        }

    def gmac(self, taus: Taus) -> float:
        """Predict the GMAC of an image."""
        experts = (self.full_gmac(g) * self.density(g, tau) for g, tau in taus.items())
        return self.base_gmac + sum(experts)

    def reachable(self) -> tuple[float, float]:
        """Predict GMAC with tau 1 and with tau 0 everywhere."""
        low, high = (self.gmac(dict.fromkeys(self.tails, tau)) for tau in (1.0, 0.0))
        return low, high

    def rules(self, taus: Taus) -> list[SelectionRule]:
        """Make a rule for each sparse scale."""
        return [
            LayerThreshold(tuple(tau)) if isinstance(tau, list) else Threshold(tau)
            for tau in self.as_lists(taus)
        ]

    def as_lists(self, taus: Taus) -> list[float] | list[list[float]]:
        """Write tau as configurations have them: selection.tau, or by layer selection.layer_tau."""
        if all(len(group) == 1 for group in taus):
            return [taus[si,] for si in self.scales]
        return [[taus[si, i] for i in range(self.num_layers)] for si in self.scales]


def _joined(tails: Sequence[Tails]) -> Tails:
    """Join the layers of a scale into one group."""
    density = np.mean([each.density_G for each in tails], axis=0)
    return Tails(density, np.sum([each.dropped_G for each in tails], axis=0))


@dataclass(frozen=True)
class Losses:
    """What a group alone costs in quality: the rise of loss above every expert's, at some tau."""

    taus: tuple[float, ...]
    losses: tuple[float, ...]


def measure_losses(
    plan: Plan,
    densities: Sequence[float],
    loss: Callable[[Taus], float] | None,
    progress: Callable[[], object],
) -> dict[Group, Losses]:
    """Measure every group at the tau of these densities and at tau 1: the rise of `loss`, or for
    None the squared scores dropped. `progress` is called after each measurement."""
    nothing: dict[Group, float] = dict.fromkeys(plan.tails, 0.0)
    start = loss(nothing) if loss is not None else 0.0
    found = {}
    for group, tails in plan.tails.items():
        taus = (*(tails.tau(density) for density in densities), 1.0)
        losses = []
        for tau in taus:
            if loss is None:
                losses.append(tails.dropped(tau))
            else:
                losses.append(loss({**nothing, group: tau}) - start)
                progress()
        found[group] = Losses(taus, tuple(losses))
    return found


def taus_for(plan: Plan, losses: Mapping[Group, Losses], target_gmac: float) -> Taus:
    """Find the tau of each group at which an image costs the target, at the least loss.

    Raise ValueError if the experts cannot save as much.
    """
    curves = {}
    for group, measured in losses.items():
        shares = tuple(plan.density(group, tau) for tau in measured.taus)
        curves[group] = LossCurve(shares, measured.losses, plan.full_gmac(group))
    everything = plan.base_gmac + sum(plan.full_gmac(group) for group in plan.tails)
    densities = allocate(curves, max(0.0, everything - target_gmac))
    return {group: plan.tails[group].tau(density) for group, density in densities.items()}
