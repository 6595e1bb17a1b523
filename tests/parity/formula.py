"""Weights, inputs and draws of the parity models, from formulas that no library version changes."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch

SMALL = ("conv_in.", "conv2.", "proj_out.", "word_embed.", "pos_", "lvl_embed.", ".bias")
"""Parts of names. What residual streams sum up is small, so that every norm's eps shows."""


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Within [-1, 1), float64: the top 53 bits of PCG64's raw output, seeded by the name."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return ((bits >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 parameter of that name in a published state dict."""
    values = uniform(name, shape)
    if name.endswith("scale_mul_1H11"):
        values = 3 + 3 * values  # of some heads over the cap, which is 4.6
    elif "norm" in name and name.endswith(".weight"):
        values = 1 + values / 2
    elif name.endswith(".weight") and "emb." not in name and "embedding." not in name:
        values *= (3 / math.prod(shape[1:])) ** 0.5
    if any(part in name for part in SMALL):
        values *= 0.05
    if "ada" in name and "head" not in name:
        values.reshape(6, -1)[:2] *= 0.1  # the gammas
    if name == "head.weight":
        values *= 3
    return torch.from_numpy(values.astype(np.float32))


def images(batch: int, size: int) -> torch.Tensor:
    """(B, 3, R, R) in [-1, 1]: noise over a gradient."""
    noise = uniform("images", (batch, 3, size, size))
    return torch.from_numpy((noise + np.linspace(-1, 1, size)).astype(np.float32) / 2)


def exponential_(
    tensor: torch.Tensor, lambd: float = 1.0, *, generator: torch.Generator
) -> torch.Tensor:
    """In the place of torch's, whose draws differ from build to build: the uniform ones do not."""
    draws = torch.rand(tensor.shape, dtype=torch.float64, generator=generator)
    return tensor.copy_(-torch.log1p(-draws) / lambd)
