"""How many experts ran, by scale, layer and token; and what that comes to for each image.

Legend: B batch, L tokens, R rows of the transformer's batch, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmoe_var.moe.observer import Observer, Routed
from dmoe_var.moe.selection import SelectionRule


class ExpertCounts(Observer):
    """How many experts ran on each token, by scale and layer: what FLOPs and maps are made of.

    Rows are the sampler's: the conditional branch of all images, then the unconditional one.
    """

    def __init__(self) -> None:
        self._by_scale: dict[int, list[Tensor]] = {}

    def record(self, si: int, mask_BLE: Tensor) -> None:
        """Add one layer's mask; layers arrive in order."""
        self._by_scale.setdefault(si, []).append(mask_BLE.sum(-1, dtype=torch.int16))

    def on_routing(self, routed: Routed) -> None:
        self.record(routed.si, routed.mask_BLE)

    @property
    def scales(self) -> list[int]:
        return sorted(self._by_scale)

    def per_token(self, si: int) -> Tensor:
        """Experts run, int16 (layers, B, L)."""
        return torch.stack(self._by_scale[si])


def pairs_per_image(
    batches: Iterable[ExpertCounts], rules: Mapping[int, SelectionRule], branches: int
) -> dict[int, tuple[int, ...]]:
    """(token, expert) pairs that ran, by scale and image: all layers, rows and tokens of it.

    batches: what `generate` counted, one a batch; read one after the other, so that none need be
    kept. branches: rows an image, 2 with guidance and else 1. Raises ValueError where scales were
    counted that have no rule, or the other way round.
    """
    (pairs,) = _per_image(batches, rules, branches, (_ran,))
    return pairs


def charged_per_image(
    batches: Iterable[ExpertCounts],
    rules: Mapping[int, SelectionRule],
    branches: int,
    num_experts: int,
) -> dict[int, tuple[float, ...]]:
    """As `pairs_per_image`, by the authors' accounting; num_experts: E."""
    (charged,) = _per_image(batches, rules, branches, (partial(_charged, num_experts=num_experts),))
    return charged


def _per_image(
    batches: Iterable[ExpertCounts],
    rules: Mapping[int, SelectionRule],
    branches: int,
    reductions: Sequence[Callable[[Tensor], Tensor]],
) -> list[dict[int, tuple[Any, ...]]]:
    """What each reduction, of experts run (layers, R, l) to a number a row, (R,), comes to by scale
    and image."""
    found: list[dict[int, list[Any]]] = [{si: [] for si in rules} for _ in reductions]
    for counts in batches:
        if counts.scales != sorted(rules):
            raise ValueError(_other_scales(counts.scales, rules))
        for si in rules:
            per_token = counts.per_token(si).cpu()
            for reduce, by_scale in zip(reductions, found, strict=True):
                by_scale[si] += reduce(per_token).view(branches, -1).sum(0).tolist()
    return [{si: tuple(of) for si, of in by_scale.items()} for by_scale in found]


def _ran(per_token: Tensor) -> Tensor:
    """Pairs that ran."""
    return per_token.sum((0, 2), dtype=torch.int64)


def _charged(per_token: Tensor, num_experts: int) -> Tensor:
    """What the authors' accounting makes of them, float64."""
    ran = torch.arange(num_experts + 1, dtype=torch.float64)
    charge = ran / (1 + 0.1 * torch.log10(num_experts - ran + 1))
    rows_R = per_token.transpose(0, 1).flatten(1).long()
    # How often each number of experts ran first: whole numbers, in whatever order they are added.
    times_RE = torch.stack([torch.bincount(row, minlength=num_experts + 1) for row in rows_R])
    return (times_RE * charge).sum(1)


def _other_scales(counted: Sequence[int], rules: Mapping[int, SelectionRule]) -> str:
    return f"experts were counted at scales {counted}, the rules are for {sorted(rules)}"
