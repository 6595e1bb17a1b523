"""Drawing tokens: temperature, top-k, top-p, and where the random numbers come from.

Legend: B images, l tokens of a scale, V vocabulary, E experts.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator
from torch import Tensor

from dmoe_var import generators, values
from dmoe_var.devices import seconds_of
from dmoe_var.ops import observed

TOKENS, ROUTING = 0, 1  # purposes of an image's streams
LIMITS = 0.01, 100.0
"""Lowest and highest temperature."""


def stream_seed(seed: int, index: int, purpose: int) -> int:
    """Compute the 64-bit seed of an image's own stream.

    The low 32 bits (all that torch's CPU generator reads) are a bijection of the image's index,
    so no two of the first 2**32 images of a seed share a stream.
    """
    key = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    mixed = index & 0xFFFFFFFF
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # odd multipliers and xor-shifts are bijective
        mixed ^= mixed >> 16
        mixed = mixed * multiplier & 0xFFFFFFFF
    low = (mixed ^ (mixed >> 13)) ^ int.from_bytes(key[:4], "little")
    tail = hashlib.blake2b(key + index.to_bytes(8, "little"), digest_size=4).digest()
    return int.from_bytes(tail, "little") << 32 | low


def _given(temperature: Any) -> float | tuple[float, ...] | None:
    if temperature is None:
        return None
    return values.one_or_several("temperature", temperature, *LIMITS)


Temperature = Annotated[float | tuple[float, ...] | None, BeforeValidator(_given)]
"""Divides logits before tokens are drawn: one value, or one per scale; None leaves them."""


def by_scale(temperature: Any, num_scales: int) -> tuple[float, ...] | None:
    """Return the temperature of each scale; None for none. Raise ValueError for a wrong number."""
    if temperature is None:
        return None
    return values.by_scale("temperature", temperature, num_scales, *LIMITS)


class ImageStreams:
    """Holds one random stream per image, from a hash of the seed and the image's global index.

    With `generator`, all draws but the routing's come from it, in the published order.
    """

    def __init__(
        self,
        seed: int,
        start_index: int,
        batch: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ):
        self.device = device
        self.batch = batch
        self.generator = generator

        def streams(purpose: int) -> list[torch.Generator]:
            return [
                generators.seeded(device, stream_seed(seed, start_index + i, purpose))
                for i in range(batch)
            ]

        self._token_streams = [] if generator else streams(TOKENS)
        self._routing_streams = streams(ROUTING)

    def exponential(self, num_tokens: int, vocab_size: int) -> Tensor:
        """Draw from Exp(1), (B, l, V), float32."""
        noise_BlV = torch.empty(self.batch, num_tokens, vocab_size, device=self.device)
        if self.generator is not None:
            return _exponential_(noise_BlV, self.generator)
        for noise_lV, stream in zip(noise_BlV, self._token_streams, strict=True):
            _exponential_(noise_lV, stream)
        return noise_BlV

    def routing_noise(self, num_tokens: int, num_experts: int, branches: int) -> Tensor:
        """Draw uniform noise (branches B, l, E) for rules that select experts by chance."""
        noise = torch.empty(self.batch, branches, num_tokens, num_experts, device=self.device)
        for noise_blE, stream in zip(noise, self._routing_streams, strict=True):
            noise_blE.uniform_(generator=stream)
        return noise.transpose(0, 1).flatten(0, 1)


def _exponential_(noise: Tensor, stream: torch.Generator) -> Tensor:
    """Fill float32 noise with draws from Exp(1), as `noise.exponential_` does.

    On a CPU that inverts a double from U(0, 1) for each number, one after the other. All at once
    takes half of the time. Processors then round some logarithms otherwise, which changes about one
    number in 10^10 by one rounding.
    """
    if noise.device.type != "cpu" or not _inverts_uniform():
        return noise.exponential_(generator=stream)
    return _by_uniform(noise, stream)


def _by_uniform(noise: Tensor, stream: torch.Generator) -> Tensor:
    uniform = torch.empty_like(noise, dtype=torch.float64).uniform_(generator=stream)
    return noise.copy_(uniform.neg_().log1p_().neg_())


@cache
def _inverts_uniform() -> bool:
    """Say whether torch draws so on this CPU: on Intel's processors its numbers may be MKL's."""
    noise = torch.empty(2, 1000, dtype=torch.float32, device="cpu")
    noise[0].exponential_(generator=generators.seeded("cpu", 0))
    return torch.equal(_by_uniform(noise[1], generators.seeded("cpu", 0)), noise[0])


def filter_logits(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k, then top-p drop; top_k = 0 and top_p = 0 switch them off.

    top-k keeps what ties with the kth. top-p goes through tokens in ascending order, drops them
    while the running probability is at most 1 - top_p, and always keeps the likeliest. Of equal
    ones it drops those with the lowest numbers: the order that sorting leaves them in differs
    between batches and devices.
    """
    if top_k <= 0 and top_p <= 0:
        return logits_BlV
    V, on_cpu = logits_BlV.shape[-1], logits_BlV.device.type == "cpu"
    if top_p <= 0:
        least = logits_BlV.topk(min(top_k, V), dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return logits_BlV.masked_fill(logits_BlV < least, -torch.inf)
    below = max(0, V - top_k) if top_k > 0 else 0
    left = below if on_cpu and 2 * below > V else 0  # what top-k drops need not be sorted
    ordered = _ascending(logits_BlV, left)
    least = ordered[..., below - left, None]
    if left:
        ordered = _with_ties(ordered, (logits_BlV >= least).sum(-1, keepdim=True) - top_k)
    elif on_cpu and below and (ordered[..., below - 1, None] < least).all():
        ordered = ordered[..., below:].contiguous()
    elif below:  # a GPU would have to be waited for, to know of ties
        ordered = ordered.masked_fill(ordered < least, -torch.inf)
    count = (ordered.softmax(-1).cumsum(-1) <= 1 - top_p).sum(-1, keepdim=True)
    count = count.clamp_max(ordered.shape[-1] - 1)
    least = ordered.gather(-1, count)
    dropped, equals = logits_BlV < least, count - (ordered < least).sum(-1, keepdim=True)
    if not on_cpu or equals.any():
        equal = logits_BlV == least
        dropped |= equal & (equal.cumsum(-1) <= equals)
    return logits_BlV.masked_fill(dropped, -torch.inf)


def _with_ties(ordered_Blk: Tensor, more_Bl1: Tensor) -> Tensor:
    """Put as many values beside the kth as tie with it, and -inf where other rows have more."""
    most = int(more_Bl1.max()) if more_Bl1.numel() else 0
    if most <= 0:  # below 0 where there is NaN
        return ordered_Blk
    places = torch.arange(most, device=ordered_Blk.device)
    ties = torch.where(places >= most - more_Bl1, ordered_Blk[..., :1], -torch.inf)
    return torch.cat([ties, ordered_Blk], -1)


def _ascending(logits_BlV: Tensor, left: int) -> Tensor:
    """Sort the last dimension, on a CPU by NumPy if that is faster; leave the lowest `left` out."""
    logits_BlV = logits_BlV.detach()
    plain = logits_BlV.device.type == "cpu" and logits_BlV.dtype == torch.float32
    if plain and not observed(logits_BlV) and _numpy_sorts_faster(torch.get_num_threads()):
        kept = logits_BlV.numpy()
        kept = np.partition(kept, left, axis=-1)[..., left:] if left else kept
        return torch.from_numpy(np.sort(kept, axis=-1))
    if left:
        return logits_BlV.topk(logits_BlV.shape[-1] - left, dim=-1).values.flip(-1)
    return logits_BlV.sort(dim=-1).values


@cache
def _numpy_sorts_faster(threads: int) -> bool:
    """Measure it, once for a number of threads: NumPy may sort in vector registers, on AVX-512 in a
    tenth of torch's time, but does so on one thread."""
    generator = generators.seeded("cpu", 0)
    sample = torch.rand(128, 1024, dtype=torch.float32, device="cpu", generator=generator)
    sorts = (lambda: np.sort(sample.numpy(), axis=-1), lambda: sample.sort(dim=-1))
    by_numpy, by_torch = (min(seconds_of(sort, sample.device) for _ in range(3)) for sort in sorts)
    return by_numpy < by_torch


def draw_tokens(logits_BlV: Tensor, streams: ImageStreams) -> Tensor:
    """Draw one token per position, (B, l): argmax of p / Exp(1), as torch.multinomial does."""
    _, num_tokens, vocab_size = logits_BlV.shape
    return logits_BlV.softmax(-1).div_(streams.exponential(num_tokens, vocab_size)).argmax(-1)


def soft_mix(
    logits_BlV: Tensor, codes_VC: Tensor, progress: float, streams: ImageStreams
) -> Tensor:
    """Mix code vectors by Gumbel softmax, (B, l, C). `more_smooth` is for pictures, never for FID.

    progress: si / (S - 1).
    """
    temperature = max(0.27 * (1 - progress * 0.95), 0.005)
    gumbel = -streams.exponential(*logits_BlV.shape[1:]).log()
    mix_BlV = ((logits_BlV * (1 + progress) + gumbel) / temperature).softmax(-1)
    return mix_BlV @ codes_VC.to(mix_BlV.dtype)
