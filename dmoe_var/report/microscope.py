"""Record what the routers did for one picture with every expert on, small enough for a page.

Eq. 3 compares a score with tau times the largest of its token, so the ratio of the two scores says
up to which tau an expert runs. The experts of any tau are those of the largest scores. What a token
loses thus depends only on how many run: E numbers per token hold it for every tau.

Legend: R rows (1 or, with guidance, 2: conditional, unconditional), r those of them that select,
l tokens of a scale, N = R l, E experts, C width, K layers, S picture side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmoe_var.data.images import to_uint8
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.experts import grouped
from dmoe_var.moe.layer import MoEFFN
from dmoe_var.moe.observer import Observer, Routed, joined
from dmoe_var.moe.selection import Threshold, check_finite
from dmoe_var.ops import at_least_float32
from dmoe_var.sampling.sampler import SamplingConfig, generate

STEPS = 65535
"""A ratio of 1, and the largest error, as stored in 16 bits."""
CHUNK = 2**26
"""Numbers of expert outputs held at once."""


@dataclass(frozen=True)
class Recording:
    """One picture, by sparse scale.

    ratios: uint16 (K, R, l, E), STEPS x score / largest score of the token (STEPS if all scores are
    0, as every expert runs then). errors: float32 (K, R, l, E). At k - 1, all but the k experts of
    the largest ratios are dropped: the norm of their outputs' sum, over that of all outputs' sum (0
    if that is 0). The shared output bias, which no expert owns, is in neither. pictures: uint8
    (S, S, 3), decoded after the scale.
    """

    ratios: dict[int, np.ndarray]
    errors: dict[int, np.ndarray]
    pictures: dict[int, np.ndarray]


def record(
    model: DynamicVAR,
    vqvae: VQVAE,
    label: int,
    seed: int,
    index: int,
    sampling: SamplingConfig,
    impl: str,
) -> Recording:
    """Sample picture `index` of a seed with every expert (tau = 0), and watch the expert FFNs."""
    seen, pictures = _Given(model.moe_scales), DecodedScales(vqvae, model.moe_scales)
    generate(
        model, vqvae, [label], **sampling.options, seed=seed, selection=Threshold(0.0),
        start_index=index, impl=impl, observer=joined(seen, pictures),
    )  # fmt: skip
    ratios = {si: np.stack(layers) for si, layers in seen.ratios.items()}
    errors = {si: np.stack(layers).astype(np.float32) for si, layers in seen.errors.items()}
    return Recording(ratios, errors, {si: images[0] for si, images in pictures.by_scale.items()})


class _Given(Observer):
    """Collects the ratios and errors of a `Recording` by scale, layer by layer."""

    def __init__(self, scales: Sequence[int]):
        self.ratios: dict[int, list[np.ndarray]] = {si: [] for si in scales}
        self.errors: dict[int, list[np.ndarray]] = {si: [] for si in scales}

    def on_routing(self, routed: Routed) -> None:
        x_RlC, scores_rlE = routed.x_BLC, routed.scores_bLE
        assert isinstance(routed.ffn, MoEFFN)
        assert scores_rlE is not None
        sharing = len(x_RlC) // len(scores_rlE)
        ratios_RlE = quantised_ratios(scores_rlE).repeat(sharing, 1, 1)
        found_RlE = errors_by_count(routed.ffn, x_RlC, ratios_RlE)
        self.ratios[routed.si].append(ratios_RlE.cpu().numpy().astype(np.uint16))
        self.errors[routed.si].append(found_RlE.cpu().numpy())


class DecodedScales(Observer):
    """Decodes the pictures so far after each of some scales: uint8 (N, S, S, 3) by scale."""

    def __init__(self, vqvae: VQVAE, scales: Sequence[int]):
        self.by_scale: dict[int, np.ndarray] = {}
        self._vqvae, self._scales = vqvae, scales

    def on_scale(self, si: int, f_hat_NCHW: Tensor) -> None:
        if si in self._scales:
            self.by_scale[si] = to_uint8((self._vqvae.decode_f_hat(f_hat_NCHW) + 1) / 2)


def quantised_ratios(scores_E: Tensor) -> Tensor:
    """Divide scores (..., E) by the largest of each token; the ratios are int32 in 0..STEPS."""
    check_finite(scores_E)
    scores_E = at_least_float32(scores_E)
    largest = scores_E.amax(-1, keepdim=True)
    ratios = torch.where(largest > 0, scores_E / largest, torch.ones_like(scores_E))
    return (ratios * STEPS).round().to(torch.int32)


def runs_at(ratios_E: np.ndarray, tau: float) -> np.ndarray:
    """Apply Eq. 3 to stored ratios, bool (..., E). The page computes the same."""
    return ratios_E >= tau * STEPS


def errors_by_count(ffn: MoEFFN, x_RlC: Tensor, ratios_RlE: Tensor) -> Tensor:
    """Compute `Recording.errors` of one layer, (R, l, E), float32 or wider."""
    x_NC, ratios_NE = x_RlC.flatten(0, 1), ratios_RlE.flatten(0, 1)
    tokens = max(1, CHUNK // (ffn.num_experts * x_NC.shape[1]))
    parts = zip(x_NC.split(tokens), ratios_NE.split(tokens), strict=True)
    return torch.cat([_errors(ffn, x, ratios) for x, ratios in parts]).view(ratios_RlE.shape)


def _errors(ffn: MoEFFN, x_NC: Tensor, ratios_NE: Tensor) -> Tensor:
    out_NEC = torch.stack(list(grouped.outputs(x_NC, ffn.weights, ffn.act)), dim=1)
    order_NE = ratios_NE.argsort(dim=-1, descending=True, stable=True)
    out_NEC = out_NEC.take_along_dim(order_NE[..., None], dim=1)
    dropped_NEC = out_NEC.flip(1).cumsum(1).flip(1)  # at k: all but the first k
    norms_NE = torch.linalg.vector_norm(dropped_NEC, dim=-1)
    dropped_NE = torch.cat([norms_NE[:, 1:], torch.zeros_like(norms_NE[:, :1])], dim=1)
    every_N1 = norms_NE[:, :1]
    return torch.where(every_N1 > 0, dropped_NE / every_N1, torch.zeros_like(dropped_NE))


def num_bytes(depth: int, branches: int, num_tokens: int, num_experts: int) -> int:
    """Count a recording's bytes in the page: two 16-bit numbers per (token, expert), in base64."""
    return depth * branches * num_tokens * num_experts * 2 * 2 * 4 // 3
