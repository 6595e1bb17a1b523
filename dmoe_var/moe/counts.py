"""Count the experts that ran, by scale, layer and token, and sum them up for each image.

Legend: B batch, L tokens, R rows of the transformer's batch, E experts, N images, S scales with a
rule, K = E + 1: from no expert to all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmoe_var.moe.kept import Kept
from dmoe_var.moe.observer import Observer, Routed
from dmoe_var.moe.selection import SelectionRule

SKIPPED = -1
"""Stands for the number of experts of a token that skipped the FFN."""


class ExpertCounts(Observer):
    """Counts the experts that ran on each token, by scale and layer. FLOPs and maps use them.

    Rows are in the sampler's order: the conditional branch of all images, then the unconditional.
    """

    def __init__(self) -> None:
        self._by_scale: dict[int, list[Tensor]] = {}
        self.num_experts = 0

    def record(self, si: int, mask_BLE: Tensor, kept: Kept | None = None) -> None:
        """Add one layer's mask; layers arrive in order."""
        self.num_experts = mask_BLE.shape[-1]
        ran_BL = mask_BLE.sum(-1, dtype=torch.int16)
        if kept is not None:
            skipped_BL = ran_BL.new_full((len(ran_BL), kept.num_tokens), SKIPPED)
            ran_BL = kept.put(ran_BL[..., None], skipped_BL[..., None]).squeeze(-1)
        self._by_scale.setdefault(si, []).append(ran_BL)

    def on_routing(self, routed: Routed) -> None:
        self.record(routed.si, routed.mask_BLE, routed.kept)

    @property
    def scales(self) -> list[int]:
        return sorted(self._by_scale)

    def per_token(self, si: int) -> Tensor:
        """How many experts ran on each token, int16 (layers, B, L); SKIPPED if it passed none."""
        return torch.stack(self._by_scale[si])


@dataclass(frozen=True, eq=False)
class ExpertHistogram:
    """Holds, per image and scale with a rule, on how many tokens k of the E experts ran. Tokens are
    counted over all layers and rows of an image."""

    scales: tuple[int, ...]
    times_NSK: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, counts: ExpertCounts, rules: Mapping[int, SelectionRule], num_images: int
    ) -> ExpertHistogram:
        """Build the histogram of a batch that `generate` has sampled; `rules` are by scale.

        Raises ValueError if the counted scales are not those with a rule, or if the number of rows
        is no multiple of `num_images`.
        """
        if counts.scales != sorted(rules):
            raise ValueError(other_scales(counts.scales, rules))
        K = counts.num_experts + 1
        times_NSK = np.zeros((num_images, len(rules), K), dtype=np.int64)
        for place, si in enumerate(counts.scales):
            ran = counts.per_token(si).cpu()
            if ran.shape[1] % num_images:
                raise ValueError(
                    f"experts were counted for {ran.shape[1]} rows of {num_images} images"
                )
            image_R1 = torch.arange(ran.shape[1])[:, None] % num_images
            bins = image_R1 * (K + 1) + ran - SKIPPED  # an image's first is of skipped tokens
            times = torch.bincount(bins.flatten(), minlength=num_images * (K + 1))
            times_NSK[:, place] = times.view(num_images, K + 1)[:, 1:].numpy()
        return cls(tuple(counts.scales), times_NSK)

    @classmethod
    def none(cls, num_images: int) -> ExpertHistogram:
        """Build the histogram of images that were sampled without a rule."""
        return cls((), np.zeros((num_images, 0, 1), dtype=np.int64))

    @classmethod
    def joined(cls, parts: Iterable[ExpertHistogram]) -> ExpertHistogram:
        """Join the histograms of several parts; their images follow one another."""
        given = list(parts)
        return cls(given[0].scales, np.concatenate([part.times_NSK for part in given]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertHistogram):
            return NotImplemented
        return self.scales == other.scales and np.array_equal(self.times_NSK, other.times_NSK)

    @property
    def num_images(self) -> int:
        return len(self.times_NSK)

    @property
    def num_experts(self) -> int:
        """E; 0 if there are no rules."""
        return self.times_NSK.shape[-1] - 1

    @property
    def pairs(self) -> dict[int, tuple[int, ...]]:
        """(token, expert) pairs that ran, by scale and image."""
        return self._summed(np.arange(self.num_experts + 1))

    @property
    def charged(self) -> dict[int, tuple[float, ...]]:
        """The pairs as the authors' accounting charges them (see metrics/flops.py)."""
        ran_K = np.arange(self.num_experts + 1)
        return self._summed(ran_K / (1 + 0.1 * np.log10(self.num_experts - ran_K + 1)))

    def _summed(self, weight_K: npt.NDArray[Any]) -> dict[int, tuple[Any, ...]]:
        sums_NS = (self.times_NSK * weight_K).sum(-1)
        return {si: tuple(sums_NS[:, i].tolist()) for i, si in enumerate(self.scales)}


def other_scales(counted: Sequence[int], rules: Mapping[int, SelectionRule]) -> str:
    return f"experts were counted at scales {counted}, the rules are for {sorted(rules)}"
