"""Build the samplers that are timed, ours and the published one, in a process of their own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmoe_var import generators
from dmoe_var.checkpoints import load_var, load_vqvae
from dmoe_var.metrics.flops import FlopReport, count_flops
from dmoe_var.metrics.part_timing import PartClock
from dmoe_var.metrics.timing import Call
from dmoe_var.models.blocks import Block
from dmoe_var.models.collaborative_var import AnyVAR, CollaborativeVAR
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.int8 import in_precision
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.selection import Selection
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.sampling.sampler import SamplingConfig, generate

COMPILED_VARIANTS = 256
"""Shapes of a block that may be compiled before torch would quietly run it eagerly."""


@dataclass(frozen=True)
class Task:
    """What a process needs to build its sampler, which is dynamic if `moe` is given, the folder of
    the expert VAR."""

    vqvae: str
    var: str
    patch_nums: tuple[int, ...]
    labels: tuple[int, ...]
    seed: int
    device: str
    sampling: SamplingConfig
    published: str = ""
    drafter: str = ""
    drafted_scales: int = 0
    moe: str = ""
    moe_scales: tuple[int, ...] = ()
    selection: Selection = None
    impl: str = "auto"
    skipped: SkippedMeans | None = None
    compiled: bool = False

    def load(self, counted: bool = False) -> tuple[AnyVAR, VQVAE]:
        """Load our models onto the device, in the precision of sampling. counted: without 8 bits,
        into which no tracer sees."""
        vqvae = load_vqvae(self.vqvae, self.patch_nums)
        model: AnyVAR = load_var(self.var, vqvae)
        if self.moe:
            assert isinstance(model, VAR)
            model = DynamicVAR(model, load_var(self.moe, vqvae), self.moe_scales)
            model.set_skipped(self.skipped)
        if self.drafter:
            assert not isinstance(model, CollaborativeVAR)
            model = CollaborativeVAR(load_var(self.drafter, vqvae), model, self.drafted_scales)
        dtype = self.sampling.torch_dtype
        model = model.to(self.device, dtype)
        int8 = "none" if counted else self.sampling.int8
        return in_precision(model, int8), vqvae.to(self.device, dtype)

    def options(self) -> dict[str, Any]:
        """Collect the options of `generate`, with a newly seeded generator."""
        return {
            **self.sampling.options,
            "selection": self.selection,
            "impl": self.impl,
            "generator": generators.seeded(self.device, self.seed),
        }

    def flops(self) -> FlopReport:
        """Count FLOPs over the images that are timed, as the model in floats routes them."""
        model, vqvae = self.load(counted=True)
        labels = list(self.labels)
        return count_flops(model, vqvae, labels, batch_size=len(labels), **self.options())


def ours(task: Task) -> Call:
    """Build our sampler, which draws tokens in the published order."""
    model, vqvae = task.load()
    labels, graphs = list(task.labels), task.sampling.new_graphs(torch.device(task.device))

    def call(clock: PartClock | None = None) -> Tensor:
        options = task.options() | {"graphs": graphs}
        if clock is None:
            return generate(model, vqvae, labels, **options)
        with clock.running(model, told_apart=not task.compiled and graphs is None):
            return generate(model, vqvae, labels, **options, observer=clock)

    if task.compiled:
        torch._dynamo.config.cache_size_limit = COMPILED_VARIANTS
        torch._dynamo.config.accumulated_cache_size_limit = 16 * COMPILED_VARIANTS
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
        call()  # compiles now: that is never timed, even without warm-up rounds
    if graphs is not None:
        call(), call()  # the second one records
    return call


def published(task: Task) -> Call:
    """Build the published sampler from its checkout; bfloat16 under autocast, as its authors do."""
    sys.path.insert(0, task.published)
    from models import build_vae_var  # type: ignore[import-not-found]

    shape = load_var(task.var).config
    vqvae, var = build_vae_var(
        device=task.device,
        patch_nums=task.patch_nums,
        depth=shape.depth,
        shared_aln=shape.shared_adaln,
        num_classes=shape.num_classes,
    )
    for model, file in ((vqvae, task.vqvae), (var, task.var)):
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        model.eval().requires_grad_(False)
    half = task.sampling.dtype != "float32"
    labels_B = torch.tensor(task.labels, device=task.device)

    def call() -> Tensor:
        cast = torch.autocast(torch.device(task.device).type, torch.bfloat16, enabled=half)
        with torch.inference_mode(), cast:
            images: Tensor = var.autoregressive_infer_cfg(
                B=len(labels_B),
                label_B=labels_B,
                g_seed=task.seed,
                cfg=task.sampling.cfg,
                top_k=task.sampling.top_k,
                top_p=task.sampling.top_p,
                more_smooth=task.sampling.more_smooth,
            )
        return images

    return call
