"""Head skipping: at late scales each token projects only the attention heads that give it most.

Heads are to attention's output projection what experts are to an FFN: the output is the sum of
a_i W_i over heads i, plus a bias. Of each token those with the largest ||a_i W_i|| are kept. Their
norms need no router: ||a_i W_i||^2 = a_i G_i a_i^T, with the Gram matrix G_i = W_i W_i^T. They are
exact, need no training, and cost D / C of the projection. What heads share out, queries, keys,
values and scores, is computed for all of them. The idea of routing heads is MoH's (2410.11842).

Legend: K layers, B rows, H heads, L tokens, N = B L, n one head's tokens, D head dimension, C
width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from dmoe_var import values
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.ops import at_least_float32, unrounded_linear


@dataclass(frozen=True)
class HeadSkipping:
    """Which share of the heads each token leaves out of the projection (beyond the paper)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    ratios: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Share of the heads that each token leaves out of the output projection, one per scale; an
    empty list leaves out none."""

    def __post_init__(self) -> None:
        values.take_fields(self)

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales at which heads may be left out."""
        return tuple(si for si, ratio in enumerate(self.ratios) if ratio > 0)

    def check(self, num_scales: int) -> None:
        """Raise ValueError for a model with another number of scales."""
        if self.ratios and len(self.ratios) != num_scales:
            raise ValueError(
                f"heads.ratios={values.shown(self.ratios)} has {len(self.ratios)} values; "
                f"allowed: none, or one for each of {num_scales} scales"
            )

    def num_kept(self, si: int, num_heads: int) -> int:
        """Count the heads that each token keeps at a scale; at least one."""
        return max(1, num_heads - round(self.ratios[si] * num_heads)) if self.ratios else num_heads


@dataclass(frozen=True, eq=False)
class Heads:
    """Projects each token's heads with the largest outputs: of all layers, or of one (`at`)."""

    num_kept: int
    grams_KHDD: Tensor

    def at(self, layer: int) -> Heads:
        """Return those of one layer, with grams (1, H, D, D)."""
        return Heads(self.num_kept, self.grams_KHDD[layer : layer + 1])

    def norms(self, a_HND: Tensor) -> Tensor:
        """Compute ||a_i W_i||_2 of every head, (H, N), in float32."""
        a_HND = at_least_float32(a_HND)
        squares_HN = (torch.matmul(a_HND, self.grams_KHDD[0]) * a_HND).sum(-1)
        return squares_HN.clamp_min(0).sqrt()

    def project(self, a_BHLD: Tensor, proj: nn.Linear) -> Tensor:
        """Sum a_i W_i over the heads that a token keeps, and add the bias, (B, L, C). On a GPU the
        host waits to learn each head's tokens."""
        B, H, L, _ = a_BHLD.shape
        a_HND = a_BHLD.transpose(0, 1).flatten(1, 2)
        kept_kN = self.norms(a_HND).topk(self.num_kept, dim=0).indices
        mask_HN = torch.zeros((H, B * L), dtype=torch.bool, device=a_HND.device)
        mask_HN = mask_HN.scatter(0, kept_kN, torch.ones_like(kept_kN, dtype=torch.bool))
        rows = Dispatch(mask_HN.T).rows
        # In half precision heads add up in float32, and the sum is rounded once, as a product's is.
        out_NC = at_least_float32(proj.bias).expand(B * L, -1).clone()
        weights_HCD = proj.weight.unflatten(1, (H, -1)).unbind(1)
        for a_ND, rows_n, weight_CD in zip(a_HND, rows, weights_HCD, strict=True):
            out_nC = unrounded_linear(a_ND.index_select(0, rows_n), weight_CD, ragged=True)
            out_NC.index_add_(0, rows_n, out_nC)
        return out_NC.to(a_BHLD.dtype).view(B, L, -1)


@torch.no_grad()
def grams(projections: Iterable[nn.Linear], num_heads: int) -> Tensor:
    """Compute W_i W_i^T of each projection's heads, (K, H, D, D), in float32."""
    found = []
    for proj in projections:
        weight_HDC = at_least_float32(proj.weight).T.unflatten(0, (num_heads, -1))
        found.append(weight_HDC @ weight_HDC.mT)
    return torch.stack(found)
