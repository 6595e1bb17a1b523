"""Experts with weights by chance, and what they come to in float64."""

from __future__ import annotations

import torch

from dmoe_var.moe.experts import ExpertWeights


def layer(C, E, D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = ((E, D, C), (E, D), (E, D, C), (C,))
    return ExpertWeights(*(torch.randn(s, generator=generator).to(dtype) for s in shapes))


def tokens(N, C, dtype=torch.float32):
    return torch.randn(N, C, generator=torch.Generator().manual_seed(2)).to(dtype)


def in_float64(x, mask, weights):
    """Per expert and token, by hand."""
    w1, b1, w2, b2 = (w.double() for w in weights)
    out = b2.expand(len(x), -1).clone()
    for e in range(len(w1)):
        hidden = (x.double() @ w1[e].T + b1[e]).clamp_min(0).to(x.dtype).double()
        out += mask[:, e, None] * (hidden @ w2[e])
    return out
