"""Transformer block of VAR: self-attention and FFN under adaptive layer norm (AdaLN).

Legend: B batch, L tokens, C width, H heads, D head dimension (C / H), 6 the AdaLN chunks in the
order gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2. What depends neither on the tokens nor
on the picture's scale is computed apart: `VAR.modulation`, `SelfAttention.vectors`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_var.models.kv_cache import KVCache
from dmoe_var.moe.layer import feed
from dmoe_var.ops import Linear, activated, activation, at_least_float32, linear

if TYPE_CHECKING:
    from dmoe_var.models.head_skipping import Heads
    from dmoe_var.models.token_skipping import Skip
    from dmoe_var.moe.routing import Routing

MAX_SCALE_MUL = math.log(100)


class Rows(NamedTuple):
    """Says where a part lies in a whole batch: rows start, start + 1, ... of `total`.

    Random numbers are drawn for the whole batch, and a part takes its cut. So neither gradient
    accumulation nor the number of processes changes what a row gets.
    """

    start: int
    total: int


def whole(num_rows: int) -> Rows:
    """Return the rows of a batch that is not cut."""
    return Rows(0, num_rows)


class Modulation(NamedTuple):
    """Holds AdaLN's chunks for every block, (B, 1, 6, C) each, and the head norm, (B, 1, 2, C).
    Where a scale is meant they hold 1 + scale."""

    blocks: list[Tensor]
    head: Tensor

    def of_rows(self, num_rows: int) -> Modulation:
        """Return that of the first rows."""
        return Modulation([block[:num_rows] for block in self.blocks], self.head[:num_rows])


class DropPath(nn.Module):
    """While training, drops a row's whole residual branch by zeroing its gain gamma (B, 1, C)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, gamma_B1C: Tensor, rows: Rows | None) -> Tensor:
        if self.rate == 0 or not self.training:
            return gamma_B1C
        start, total = rows or whole(len(gamma_B1C))
        keep = gamma_B1C.new_empty(total, 1, 1).bernoulli_(1 - self.rate)
        return gamma_B1C * keep[start : start + len(gamma_B1C)] / (1 - self.rate)


class FFN(nn.Module):
    """Computes fc2(act(fc1(x)))."""

    def __init__(self, width: int, hidden: int, act: str):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.act = activation(act)
        self.fc2 = Linear(hidden, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(activated(self.act, self.fc1, x_BLC))


class Vectors(NamedTuple):
    """Holds what attention adds to and multiplies with every token."""

    bias_3C: Tensor
    """Added to queries, keys and values; that of keys is 0."""
    scale_mul_1H11: Tensor | None
    """What unit queries are multiplied with; None without `l2_norm`."""


class SelfAttention(nn.Module):
    """Multi-head attention; with `l2_norm`, on unit queries and keys with a learnt temperature."""

    zero_k_bias: Tensor

    def __init__(self, width: int, num_heads: int, l2_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.l2_norm = l2_norm
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        # From numpy, like VAR's tables, so that a skeleton on the meta device has values here too.
        self.register_buffer("zero_k_bias", torch.from_numpy(np.zeros(width, np.float32)))
        self.proj = Linear(width, width)

    def vectors(self) -> Vectors:
        """Compute what is the same for every token."""
        bias_3C = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        if not self.l2_norm:
            return Vectors(bias_3C, None)
        return Vectors(bias_3C, self.scale_mul_1H11.clamp_max(MAX_SCALE_MUL).exp())

    def forward(
        self,
        x_BLC: Tensor,
        layer: int,
        mask_11LL: Tensor | None,
        cache: KVCache | None,
        heads: Heads | None = None,
        vectors: Vectors | None = None,
    ) -> Tensor:
        """Attend, (B, L, C). vectors: those of `vectors()`, if they are known."""
        B, L, C = x_BLC.shape
        bias_3C, scale_mul_1H11 = vectors or self.vectors()
        qkv = linear(x_BLC, self.mat_qkv.weight, bias_3C)
        q, k, v = qkv.view(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        scale = 0.25 / math.sqrt(self.head_dim)
        if scale_mul_1H11 is not None:
            scale = 1.0
            q, k = F.normalize(q, dim=-1) * scale_mul_1H11, F.normalize(k, dim=-1)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mask = None if mask_11LL is None else mask_11LL.to(q.dtype)
        h_BHLD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if heads is not None:
            return heads.project(h_BHLD, self.proj)
        return self.proj(h_BHLD.transpose(1, 2).reshape(B, L, C))


class Block(nn.Module):
    """x += gamma1 attn(LN(x)(1 + scale1) + shift1); x += gamma2 ffn(LN(x)(1 + scale2) + shift2).

    Without `shared_adaln` the block has a projection of the condition to itself (`ada_lin`). With
    it, the block has a parameter (`ada_gss`) to add to one that all blocks share. `VAR.modulation`
    computes both.
    """

    def __init__(
        self,
        width: int,
        ffn: nn.Module,
        num_heads: int,
        drop_path: float,
        l2_norm: bool,
        shared_adaln: bool,
        norm_eps: float,
    ):
        super().__init__()
        self.width = width
        self.norm_eps = norm_eps
        self.shared_adaln = shared_adaln
        self.attn = SelfAttention(width, num_heads, l2_norm)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)
        if shared_adaln:
            ada_gss = nn.init.normal_(torch.empty(1, 1, 6, width), std=width**-0.5)
            self.ada_gss = nn.Parameter(ada_gss)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def _norm(self, x_BLC: Tensor) -> Tensor:
        return F.layer_norm(x_BLC, (self.width,), eps=self.norm_eps)

    def forward(
        self,
        x_BLC: Tensor,
        mod_B16C: Tensor,
        layer: int,
        mask_11LL: Tensor | None = None,
        cache: KVCache | None = None,
        routing: Routing | None = None,
        rows: Rows | None = None,
        skip: Skip | None = None,
        heads: Heads | None = None,
        vectors: Vectors | None = None,
    ) -> Tensor:
        """Run the block, (B, L, C). mod_B16C, vectors: of `VAR.modulation`, `attn.vectors`."""
        gamma1, gamma2, gain1, gain2, shift1, shift2 = mod_B16C.unbind(2)
        if cache is None:  # with a cache nothing is trained, even in train mode
            gamma1, gamma2 = self.drop_path(gamma1, rows), self.drop_path(gamma2, rows)
        h_BLC = torch.addcmul(shift1, self._norm(x_BLC), gain1)
        if skip is None:
            attended = self.attn(h_BLC, layer, mask_11LL, cache, heads, vectors)
        else:
            how = {"layer": layer, "mask_11LL": mask_11LL, "cache": cache, "heads": heads}
            attention = partial(self.attn, **how, vectors=vectors)
            attended = skip.attended(attention, x_BLC, h_BLC)
        x_BLC = torch.addcmul(x_BLC, attended, gamma1)
        normed_BLC = self._norm(x_BLC)
        h_BLC = torch.addcmul(shift2, normed_BLC, gain2)
        if skip is None:
            fed = feed(self.ffn, h_BLC, normed_BLC, routing)
        else:
            fed = skip.fed(self.ffn, x_BLC, h_BLC, normed_BLC, routing)
        return torch.addcmul(x_BLC, fed, gamma2)


class HeadNorm(nn.Module):
    """Applies AdaLN before the head: LN(x)(1 + scale) + shift."""

    def __init__(self, width: int, norm_eps: float):
        super().__init__()
        self.width = width
        self.norm_eps = norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def modulation(self, cond_BC: Tensor) -> Tensor:
        """Compute 1 + scale and shift, (B, 1, 2, C)."""
        scale, shift = self.ada_lin(cond_BC).view(-1, 1, 2, self.width).split(1, dim=2)
        return torch.cat([1 + scale, shift], dim=2)

    def forward(self, x_BLC: Tensor, mod_B12C: Tensor) -> Tensor:
        gain, shift = mod_B12C.unbind(2)
        normed = F.layer_norm(at_least_float32(x_BLC), (self.width,), eps=self.norm_eps)
        return normed * gain + shift
