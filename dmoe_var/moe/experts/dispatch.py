"""Which experts run on which tokens: the mask, and what compute paths derive from it.

Legend: N tokens, E experts, P (token, expert) pairs, n one expert's tokens.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor


class Dispatch:
    """Holds a layer's mask. Everything else is computed at its first use and kept; on a GPU that
    makes the host wait."""

    def __init__(self, mask_NE: Tensor, pairs: int | None = None):
        """pairs: how many run, if that is known."""
        self.mask_NE = mask_NE
        if pairs is not None:
            self.density = pairs / mask_NE.numel()

    @cached_property
    def density(self) -> float:
        """The share of pairs that run; the mask must not be empty."""
        return float(self.mask_NE.count_nonzero()) / self.mask_NE.numel()

    def is_full(self) -> bool:
        """Say whether it is known that all pairs run: somebody has asked for the density."""
        return vars(self).get("density") == 1

    @cached_property
    def tokens_P(self) -> Tensor:
        """The tokens of the first expert, then those of the second, and so on; int64."""
        return self.mask_NE.T.nonzero()[:, 1]

    @cached_property
    def counts(self) -> list[int]:
        """The number of tokens of each expert, E numbers."""
        return self.mask_NE.sum(0).tolist()

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """Each expert's tokens, (n,) of tokens_P."""
        return self.tokens_P.split(self.counts)
