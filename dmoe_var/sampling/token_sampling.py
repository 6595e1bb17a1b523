"""Drawing tokens: temperature, top-k, top-p, and where the random numbers come from.

Legend: B images, l tokens of a scale, V vocabulary, E experts.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from dmoe_var import generators, values

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
            return noise_BlV.exponential_(generator=self.generator)
        for noise_lV, stream in zip(noise_BlV, self._token_streams, strict=True):
            noise_lV.exponential_(generator=stream)
        return noise_BlV

    def routing_noise(self, num_tokens: int, num_experts: int, branches: int) -> Tensor:
        """Draw uniform noise (branches B, l, E) for rules that select experts by chance."""
        noise = torch.empty(self.batch, branches, num_tokens, num_experts, device=self.device)
        for noise_blE, stream in zip(noise, self._routing_streams, strict=True):
            noise_blE.uniform_(generator=stream)
        return noise.transpose(0, 1).flatten(0, 1)


def filter_logits(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k, then top-p drop; top_k = 0 and top_p = 0 switch them off.

    top-p goes through tokens in ascending order, drops them while the running probability is at
    most 1 - top_p, and always keeps the likeliest. Of equal ones it drops those with the lowest
    numbers: the order that sorting leaves them in differs between batches and devices.
    """
    ascending = None
    if top_k > 0:
        logits_BlV, ascending = _keep_top_k(logits_BlV, top_k, top_p > 0)
    if top_p > 0:
        ordered = logits_BlV.sort(dim=-1).values if ascending is None else ascending
        count = (ordered.softmax(-1).cumsum(-1) <= 1 - top_p).sum(-1, keepdim=True)
        count = count.clamp_max(ordered.shape[-1] - 1)
        least = ordered.gather(-1, count)
        dropped, equals = logits_BlV < least, count - (ordered < least).sum(-1, keepdim=True)
        if logits_BlV.device.type != "cpu" or equals.any():  # a GPU would have to be waited for
            equal = logits_BlV == least
            dropped |= equal & (equal.cumsum(-1) <= equals)
        logits_BlV = logits_BlV.masked_fill(dropped, -torch.inf)
    return logits_BlV


def _keep_top_k(logits_BlV: Tensor, top_k: int, wants_order: bool) -> tuple[Tensor, Tensor | None]:
    """Return the logits with -inf for all below the kth, and those left in ascending order: None if
    the order is not wanted, or if ties leave more than k on a CPU.

    On a GPU one sort of all logits gives both: that is faster than waiting to know of ties.
    """
    V = logits_BlV.shape[-1]
    k, on_cpu = min(top_k, V), logits_BlV.device.type == "cpu"
    if wants_order and not on_cpu:
        ordered = logits_BlV.sort(dim=-1).values
        least = ordered[..., V - k, None]
        ordered = ordered.masked_fill(ordered < least, -torch.inf)
        return logits_BlV.masked_fill(logits_BlV < least, -torch.inf), ordered
    kept = logits_BlV.topk(k, dim=-1, sorted=wants_order).values
    dropped = logits_BlV < (kept[..., -1:] if wants_order else kept.amin(-1, keepdim=True))
    logits_BlV = logits_BlV.masked_fill(dropped, -torch.inf)
    if not wants_order or int(dropped.count_nonzero()) != dropped.numel() // V * (V - k):
        return logits_BlV, None
    return logits_BlV, kept.flip(-1)


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
