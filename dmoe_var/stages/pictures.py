"""Collects what figures 2b and 12 show: the picture after each sparse scale and its experts.

Legend: N images, S sparse scales, R image side, P side of the finest scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe_var.figures.expert_maps import ExpertMaps
from dmoe_var.metrics.images import to_uint8
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.moe.layer import ExpertCounts
from dmoe_var.moe.selection import Selection
from dmoe_var.sampling.sampler import generate
from dmoe_var.stages.evaluate import Bench
from dmoe_var.stages.work import Work


@torch.inference_mode()
def collect_maps(
    work: Work, bench: Bench, labels: Sequence[int], selection: Selection, seed: int
) -> ExpertMaps:
    """Maps of one image a label at `moe.scales`."""
    config = work.config
    model = DynamicVAR(bench.dense, bench.experts, config.moe.scales)
    counts, pictures = ExpertCounts(), {}

    def keep(si: int, f_hat_BCHW: Tensor) -> None:
        if si in config.moe.scales:
            decoded = (bench.vqvae.decode_f_hat(f_hat_BCHW) + 1) / 2
            pictures[si] = to_uint8(decoded)

    generate(
        model,
        bench.vqvae,
        list(labels),
        **config.sampling.options,
        seed=seed,
        selection=selection,
        impl=config.moe.impl,
        counts=counts,
        on_scale=keep,
    )
    most = config.var.depth * (config.var.hidden // config.split.expert_size)
    finest = config.var.patch_nums[-1]
    maps = [_share(counts.per_token(si), len(labels), most, finest) for si in config.moe.scales]
    images = np.stack([pictures[si] for si in config.moe.scales], axis=1)
    return ExpertMaps(images, np.stack(maps, axis=1))


def _share(per_token: Tensor, num_images: int, most: int, finest: int) -> np.ndarray:
    """Share of experts run on each token, (N, P, P), of counts (layers, rows, l)."""
    conditional_Nl = per_token[:, :num_images].sum(0).float() / most
    side = round(conditional_Nl.shape[1] ** 0.5)
    share_N1pp = conditional_Nl.view(num_images, 1, side, side)
    return F.interpolate(share_N1pp, size=(finest, finest), mode="nearest")[:, 0].cpu().numpy()
