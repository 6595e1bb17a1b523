"""The tokens of a scale that pass a module if others are skipped.

Legend: R rows, l tokens of a scale, K those kept, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """Says which tokens of each row are kept, rising, and of how many."""

    places_RK: Tensor
    num_tokens: int

    def take(self, x_RlC: Tensor) -> Tensor:
        """Return the kept tokens, (R, K, C), of some of the first rows."""
        return x_RlC.gather(1, self._at(len(x_RlC), x_RlC.shape[-1]))

    def put(self, x_RKC: Tensor, whole_RlC: Tensor) -> Tensor:
        """Return `whole_RlC` with the kept tokens replaced."""
        return whole_RlC.scatter(1, self._at(len(x_RKC), x_RKC.shape[-1]), x_RKC)

    def _at(self, num_rows: int, num_channels: int) -> Tensor:
        return self.places_RK[:num_rows, :, None].expand(-1, -1, num_channels)
