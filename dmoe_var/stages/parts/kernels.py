"""Time the expert paths by themselves: on a layer's shapes with experts of several sizes, and on
the layers of a model as it samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import StageResult
from dmoe_var.figures.kernels import NO_ZEROS, RANDOM, draw_kernels
from dmoe_var.metrics.kernel_timing import Layer, Shape, measured_rates, random_layer, time_layers
from dmoe_var.metrics.triton_prediction import GPUS, predicted
from dmoe_var.models.guidance import branches, by_scale
from dmoe_var.moe.experts import auto
from dmoe_var.moe.layer import MoEFFN
from dmoe_var.moe.observer import Observer, Routed
from dmoe_var.moe.selection import Selection
from dmoe_var.sampling.draw import balanced_labels
from dmoe_var.sampling.sampler import generate
from dmoe_var.stages.parts import loaded

IMAGES_ON_GPU = 64
"""Images whose tokens are timed on a GPU too."""


def run_kernels(experiment: Experiment, selections: Mapping[str, Selection]) -> StageResult:
    """Time a layer of the configured width at each of `moe.scales` and, with `real_masks`, those of
    the model under each selection. Write kernels.png.

    Each is also timed with every expert and no hidden value that is 0, which tells the rate of a
    path's products by themselves. With `predict`, `about` holds what `triton` should take on GPUs.
    """
    benchmark, sampling, device = (
        experiment.config.benchmark,
        experiment.config.sampling,
        experiment.device,
    )
    shapes = _shapes(experiment)
    about = {
        f"predicted_{name}": [
            row
            for shape in shapes
            for row in predicted(shape, benchmark.densities, sampling.torch_dtype, GPUS[name])
        ]
        for name in benchmark.predict
    }
    rates = measured_rates(device, sampling.torch_dtype, benchmark.repeats)
    rows: list[dict[str, Any]] = []
    for shape in tqdm(shapes, desc="kernels", unit="shape", disable=not experiment.progress):
        for masks, densities in ((RANDOM, benchmark.densities), (NO_ZEROS, (1.0,))):
            zeros = masks != NO_ZEROS
            layer = random_layer(shape, densities, device, sampling.torch_dtype, zeros)
            with auto.apart():
                timed = time_layers(shape, [layer], rates, benchmark.repeats)
            rows += [row | {"masks": masks} for row in timed]
    for size in benchmark.sizes if benchmark.real_masks else ():
        for name, selection in selections.items():
            for shape, layers in _drawn(experiment, selection, size):
                timed = time_layers(shape, layers, rates, benchmark.repeats)
                rows += [row | {"masks": name} for row in timed]
    product, copy = rates.gflops_per_s, rates.gbytes_per_s
    metrics = {"product_gflops_per_s": product, "copy_gbytes_per_s": copy}
    for row in rows:
        masks = "" if row["density"] is None else f"_d{row['density']:g}"
        masks = masks if row["masks"] == RANDOM else f"_{row['masks']}"
        name = f"{row['impl']}_e{row['expert_size']}_n{row['tokens']}{masks}"
        metrics[f"{name}_ms_median"] = row["ms_median"]
        metrics[f"{name}_time_ratio"] = row["time_ratio"]
    draw_kernels(rows, experiment.folder("benchmark") / "kernels.png")
    return StageResult(metrics, 0, {"kernels": rows, **about}, dtype=sampling.dtype)


def _shapes(experiment: Experiment) -> list[Shape]:
    """List the shapes. Raise ConfigError for experts that do not divide the hidden width."""
    config, found = experiment.config, []
    branches_S = branches(by_scale(config.sampling.cfg, config.var.num_scales))
    for size in config.benchmark.expert_sizes:
        if config.var.hidden % size:
            raise ConfigError(
                f"benchmark.expert_sizes={size} must divide the hidden width {config.var.hidden}"
            )
        for batch in _batches(experiment):
            for si in config.moe.scales:
                tokens = branches_S[si] * batch * config.var.patch_nums[si] ** 2
                found.append(Shape(config.name, config.var.C, config.var.hidden, size, tokens))
    return found


def _batches(experiment: Experiment) -> tuple[int, ...]:
    """List the batch sizes. A GPU is far from busy with the tokens of one image."""
    benchmark = experiment.config.benchmark
    if experiment.device.type == "cuda" and not benchmark.batch_sizes:
        return tuple(sorted({*benchmark.sizes, IMAGES_ON_GPU}))
    return benchmark.sizes


class _Given(Observer):
    """Keeps the expert FFNs of each scale with their tokens and masks, layer by layer."""

    def __init__(self) -> None:
        self.by_scale: dict[int, list[tuple[MoEFFN, Tensor, Tensor]]] = {}

    def on_routing(self, routed: Routed) -> None:
        assert isinstance(routed.ffn, MoEFFN)
        seen = (routed.ffn, routed.x_BLC.flatten(0, 1), routed.mask_BLE.flatten(0, 1))
        self.by_scale.setdefault(routed.si, []).append(seen)


@torch.no_grad()
def _drawn(
    experiment: Experiment, selection: Selection, size: int
) -> list[tuple[Shape, list[Layer]]]:
    """Sample `size` images; keep each sparse scale's expert FFNs with their tokens and masks."""
    config, sampling = experiment.config, experiment.config.sampling
    vqvae = loaded.vqvae(experiment).to(experiment.device, sampling.torch_dtype)
    model = loaded.dynamic(experiment).to(experiment.device, sampling.torch_dtype)
    given = _Given()
    labels = torch.from_numpy(balanced_labels(size, config.var.num_classes))
    generate(
        model, vqvae, labels, **sampling.options, seed=config.evaluate.seed,
        selection=selection, impl=config.moe.impl, observer=given,
    )  # fmt: skip
    found = []
    for layers in given.by_scale.values():
        tokens, size = len(layers[0][1]), config.split.expert_size
        density = float(torch.stack([mask for *_, mask in layers]).float().mean())
        shape = Shape(config.name, config.var.C, config.var.hidden, size, tokens)
        found.append((shape, [Layer(ffn, x_NC, {density: mask}) for ffn, x_NC, mask in layers]))
    return found
