"""Map the picture after each sparse scale and the experts it took, for figures 2b and 12."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dmoe_var.arrays import read_npz, write_npz
from dmoe_var.config.root import Config
from dmoe_var.distributed import barrier, is_main
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.figures.expert_maps import ExpertMaps
from dmoe_var.models.collaborative_var import AnyVAR
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.int8 import in_precision
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.observer import joined
from dmoe_var.moe.selection import Selection, SelectionConfig
from dmoe_var.report.microscope import DecodedScales
from dmoe_var.sampling.sampler import generate
from dmoe_var.stages.parts.loaded import (
    EXPERTS,
    Models,
    check_drafter,
    drafter_keys,
    needs_experts,
)
from dmoe_var.stages.parts.on_device import check_sampling
from dmoe_var.stages.parts.skipped_means import get_means, let_means_stand

MAPS_FILE = "maps.npz"
CHOSEN = "chosen"


def run(experiment: Experiment) -> StageResult:
    """Write maps.npz: for setting i, images_i uint8 (N, S, R, R, 3) and maps_i float (N, S, P, P),
    for N images and S sparse scales. about["settings"] names the settings, the chosen one first."""
    config, maps = experiment.config, experiment.config.maps
    shown = {CHOSEN: config.selection, **{f"{t:g}": SelectionConfig(tau=(t,)) for t in maps.tau}}
    labels = list(range(min(maps.images, config.var.num_classes)))
    models = Models(experiment)
    get_means(models, experiment, [each.rules() for each in shown.values()])
    if is_main():
        arrays = dict[str, np.ndarray]()
        for i, selection in enumerate(shown.values()):
            found = collect_maps(experiment, models, labels, selection.rules(), maps.seed)
            arrays |= {f"images_{i}": found.images, f"maps_{i}": found.maps}
        write_npz(experiment.folder("maps") / MAPS_FILE, arrays)
    barrier()
    settings = [{"name": name, "selection": each.text} for name, each in shown.items()]
    about = {"samples": MAPS_FILE, "settings": settings, "scales": list(config.moe.scales)}
    return StageResult({}, len(labels), about, maps.seed, config.sampling.dtype)


def stored_maps(folder: Path, number: int) -> ExpertMaps:
    """Read the maps of one setting. Raise DataError if the file is missing or broken."""
    images, maps = read_npz(folder / MAPS_FILE, [f"images_{number}", f"maps_{number}"])
    return ExpertMaps(images, maps)


def collect_maps(
    experiment: Experiment, models: Models, labels: Sequence[int], selection: Selection, seed: int
) -> ExpertMaps:
    """Sample one image per label and map it at `moe.scales`. If several processes run, all get the
    means of the selection before (`get_means`)."""
    config = experiment.config
    refiner = DynamicVAR(models.dense, models.experts, config.moe.scales)
    let_means_stand(models, experiment, refiner, models.vqvae, selection)
    model = in_precision(models.drafted(experiment, refiner), config.sampling.int8)
    options = {**config.sampling.options, "impl": config.moe.impl}
    return maps_of(model, refiner, models.vqvae, labels, selection, seed, **options)


@torch.inference_mode()
def maps_of(
    model: AnyVAR,
    refiner: DynamicVAR,
    vqvae: VQVAE,
    labels: Sequence[int],
    selection: Selection,
    seed: int,
    **options: Any,
) -> ExpertMaps:
    """Sample one image per label by a model, and map the experts of `refiner`: the model, or the
    part of it that has experts. options: see `generate`."""
    scales, experts, sides = refiner.moe_scales, refiner.moe.config, vqvae.config.patch_nums
    counts, pictures = ExpertCounts(), DecodedScales(vqvae, scales)
    generate(
        model,
        vqvae,
        list(labels),
        **options,
        seed=seed,
        selection=selection,
        observer=joined(counts, pictures),
    )
    maps = []
    for si in scales:
        ran_KNl = counts.per_token(si)[:, : len(labels)].clamp_min(0)  # skipped tokens ran none
        conditional_Nl = ran_KNl.sum(0).float() / (experts.depth * experts.num_experts)
        share_N1pp = conditional_Nl.view(len(labels), 1, sides[si], sides[si])
        maps.append(F.interpolate(share_N1pp, size=sides[-1], mode="nearest")[:, 0].cpu().numpy())
    images = np.stack([pictures.by_scale[si] for si in scales], axis=1)
    return ExpertMaps(images, np.stack(maps, axis=1))


def reads(config: Config, ours: Config) -> Keys:
    return (*EXPERTS, *drafter_keys(config), "sampling", "maps")


def refuse(config: Config) -> None:
    check_drafter(config)
    check_sampling(config)


STAGE = Stage("maps", run, reads, needs=needs_experts, refuse=refuse)
