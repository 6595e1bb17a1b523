"""A preallocated cache of the keys and values of all scales so far.

Legend: B batch (both guidance branches), H heads, N layers, L tokens of all scales, l tokens of
one scale, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Holds one buffer for all layers. A layer writes a scale, then `advance` moves it on. Layers
    that skip tokens hold fewer.

    The dense and the MoE backbone of a DynamicVAR write into the same cache. So the MoE backbone
    sees the keys and values of the scales that the dense one ran.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], like: Tensor):
        """shape: (N, B, H, L, D). like: a tensor of the cache's dtype and device."""
        self._k_NBHLD, self._v_NBHLD = like.new_empty(shape), like.new_empty(shape)
        self.lengths = [0] * shape[0]

    def append(self, layer: int, k_BHlD: Tensor, v_BHlD: Tensor) -> tuple[Tensor, Tensor]:
        """Store one scale's keys and values of a layer; return all so far, (B, H, length, D)."""
        start = self.lengths[layer]
        end = start + k_BHlD.shape[2]
        capacity = self._k_NBHLD.shape[3]
        if end > capacity:
            raise ValueError(f"the K/V cache holds {capacity} tokens, {end} were written")
        k_BHLD, v_BHLD = self._k_NBHLD[layer], self._v_NBHLD[layer]
        k_BHLD[:, :, start:end] = k_BHlD
        v_BHLD[:, :, start:end] = v_BHlD
        return k_BHLD[:, :, :end], v_BHLD[:, :, :end]

    def keep_rows(self, num_rows: int) -> None:
        """Free the memory of all but the first rows."""
        self._k_NBHLD = self._k_NBHLD[:, :num_rows].clone()
        self._v_NBHLD = self._v_NBHLD[:, :num_rows].clone()

    def advance(self, layer: int, num_tokens: int) -> None:
        """Move a layer past the `num_tokens` tokens of a scale that it has written."""
        self.lengths[layer] += num_tokens


class GrowingCache(KVCache):
    """Joins a scale's keys and values to a copy of those so far, so that gradients flow."""

    def __init__(self) -> None:
        self._so_far: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k_BHlD: Tensor, v_BHlD: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._so_far:
            k_BHLD, v_BHLD = self._so_far[layer]
            k_BHlD, v_BHlD = torch.cat([k_BHLD, k_BHlD], 2), torch.cat([v_BHLD, v_BHlD], 2)
        self._so_far[layer] = k_BHlD, v_BHlD
        return self._so_far[layer]

    def keep_rows(self, num_rows: int) -> None:
        self._so_far = {i: (k[:num_rows], v[:num_rows]) for i, (k, v) in self._so_far.items()}

    def advance(self, layer: int, num_tokens: int) -> None:
        """Do nothing: what was joined stays."""
