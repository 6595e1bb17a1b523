"""Head skipping: at late scales each token projects only the attention heads that give it most.

Heads are to attention's output projection what experts are to an FFN: the output is the sum of
a_i W_i over heads i, plus a bias. Of each token those with the largest ||a_i W_i|| are kept. These
norms need no router and no training: ||a_i W_i||^2 = a_i G_i a_i^T, with the Gram matrix
G_i = W_i W_i^T. They cost as much as projecting one head, so that leaving out one saves nothing.
||a_i|| ||W_i||_F, their upper bound, costs nothing. Queries, keys, values and scores are computed
for all heads. The idea of routing heads is MoH's (2410.11842).

Legend: K layers, B rows, H heads, L tokens, N = B L, n one head's tokens, D head dimension, C
width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dmoe_var import values
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.ops import at_least_float32, unrounded_linear

Measure = Literal["norm", "bound"]


@dataclass(frozen=True)
class HeadSkipping:
    """Which heads the tokens of late scales leave out of the projection (beyond the paper)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    ratios: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Share of the heads that each token leaves out of the output projection, one per scale; an
    empty list leaves out none."""
    measure: Measure = "norm"
    """What tokens keep heads by: norm, of a head's output, which costs as much as projecting one
    head; or bound, above that norm, for free."""

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

    def before(self, num_scales: int) -> HeadSkipping:
        """Return that of a model that draws only the first scales."""
        rest = (0.0,) * len(self.ratios[num_scales:])
        return replace(self, ratios=self.ratios[:num_scales] + rest)

    def num_kept(self, si: int, num_heads: int) -> int:
        """Count the heads that each token keeps at a scale; at least one."""
        return max(1, num_heads - round(self.ratios[si] * num_heads)) if self.ratios else num_heads


@dataclass(frozen=True, eq=False)
class Heads:
    """Projects of each token the heads of the largest measure."""

    num_kept: int
    metrics_KHDD: Tensor
    """See `metrics`, of all layers; or of one (`at`)."""

    def at(self, layer: int) -> Heads:
        """Return that of one layer."""
        return Heads(self.num_kept, self.metrics_KHDD[layer : layer + 1])

    def measures(self, a_HND: Tensor) -> Tensor:
        """Compute the squared measure of every head, (H, N)."""
        a_HND, metric_HDD = at_least_float32(a_HND), self.metrics_KHDD[0]
        if metric_HDD.shape[1] == 1:
            return (a_HND.square() * metric_HDD).sum(-1)
        return (torch.matmul(a_HND, metric_HDD) * a_HND).sum(-1)

    def project(self, a_BHLD: Tensor, proj: nn.Linear) -> Tensor:
        """Sum a_i W_i over the heads that a token keeps, and add the bias, (B, L, C). On a GPU the
        host waits to learn each head's tokens."""
        B, H, L, _ = a_BHLD.shape
        a_HND = a_BHLD.transpose(0, 1).flatten(1, 2)
        kept_kN = self.measures(a_HND).topk(self.num_kept, dim=0).indices
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
def metrics(projections: Iterable[nn.Linear], num_heads: int, measure: Measure) -> Tensor:
    """Compute what turns each head of each layer into its measure, in float32 at least: its Gram
    matrix, (K, H, D, D), or its squared Frobenius norm, (K, H, 1, 1).

    It depends on weights alone, so that no count of FLOPs has it. Raise ValueError for weights that
    are held in 8 bits.
    """
    found = []
    for proj in projections:
        if is_traceable_wrapper_subclass(proj.weight):
            raise ValueError("heads.ratios: projections in 8 bits have no heads; allowed: none")
        weight_HDC = at_least_float32(proj.weight).T.unflatten(0, (num_heads, -1))
        if measure == "norm":
            found.append(weight_HDC @ weight_HDC.mT)
        else:
            found.append(weight_HDC.square().sum((1, 2), keepdim=True))
    return torch.stack(found)
