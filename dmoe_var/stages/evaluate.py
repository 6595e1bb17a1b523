"""One point of a quality-cost curve: samples of a model, their FLOPs and their fidelity."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dmoe_var.data import load_data
from dmoe_var.data.digits import ImageSet
from dmoe_var.metrics.agreement import LabelAgreement
from dmoe_var.metrics.fidelity import Fidelity, Statistics
from dmoe_var.metrics.flops import fixed_cost, report
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.moe.layer import ExpertCounts
from dmoe_var.sampling.draw import SAMPLES_FILE, Samples, balanced_labels, draw_samples
from dmoe_var.sampling.tau_schedule import resolve_rules
from dmoe_var.stages import models
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.work import Work


@dataclass(frozen=True)
class Bench:
    """What all points of a sweep share: models, reference statistics, classifier. Made once."""

    work: Work

    @cached_property
    def vqvae(self) -> VQVAE:
        return models.vqvae(self.work)

    @cached_property
    def dense(self) -> VAR:
        return models.dense(self.work)

    @cached_property
    def experts(self) -> VAR:
        return models.split(self.work)

    @cached_property
    def training_images(self) -> ImageSet:
        return load_data(self.work.config.data)[0]

    @cached_property
    def fidelity(self) -> Fidelity:
        return Fidelity(self.work.config.fidelity, self.work.device)

    @cached_property
    def reference(self) -> Statistics:
        images = self.training_images
        return self.fidelity.reference(images.images, self.work.cache / "fidelity", images.key)

    @cached_property
    def agreement(self) -> LabelAgreement:
        return LabelAgreement(self.training_images.images, self.training_images.labels)

    def model(self, work: Work) -> VAR | DynamicVAR:
        """The model of a point: the dense VAR, or dense and experts joined at its scales."""
        if work.config.evaluate.model == "dense":
            return self.dense
        return DynamicVAR(self.dense, self.experts, work.config.moe.scales)

    def draw(
        self, work: Work, model: VAR | DynamicVAR, labels: np.ndarray, name: str
    ) -> tuple[Samples, list[ExpertCounts]]:
        """Samples of a model under the work's sampling and, where it has experts, selection."""
        config = work.config
        return draw_samples(
            model,
            self.vqvae,
            labels,
            config.evaluate.seed,
            config.sampling,
            config.selection.rules() if isinstance(model, DynamicVAR) else None,
            config.moe.impl,
            progress=name if config.progress else None,
        )


def run(work: Work, bench: Bench | None = None) -> StageResult:
    """Draw, measure, store the samples. `bench` is shared by the points of a sweep."""
    bench = bench or Bench(work)
    config = work.config
    model = bench.model(work)
    labels = balanced_labels(config.evaluate.num_samples, config.var.num_classes)
    vqvae, fidelity, reference = bench.vqvae, bench.fidelity, bench.reference
    started = time.perf_counter()
    samples, counts = bench.draw(work, model, labels, describe(work))
    _synchronise(work.device)
    seconds = time.perf_counter() - started
    selection = config.selection.rules() if isinstance(model, DynamicVAR) else None
    rules = resolve_rules(None, selection, config.var.num_scales, model.moe_scales)
    guided, smooth = config.sampling.cfg != 0, config.sampling.more_smooth
    fixed = fixed_cost(model, vqvae, guided, more_smooth=smooth)
    flops = report(fixed, counts, rules, len(labels))
    metrics = {
        **flops.metrics(),
        **fidelity.score(samples.images, reference),
        "label_agreement": bench.agreement.accuracy(samples.images, samples.labels),
        "sampling_ms_per_image": 1000 * seconds / len(labels),
    }
    samples.save(work.folder("evaluate") / SAMPLES_FILE)
    about = {"samples": SAMPLES_FILE, "fidelity": fidelity.name}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return StageResult(metrics, len(labels), about, config.evaluate.seed, dtype)


def describe(work: Work) -> str:
    """A point in a few words."""
    config = work.config
    if config.evaluate.model == "dense":
        return f"dense seed {config.evaluate.seed}"
    rule = config.selection.rule
    value = {
        "threshold": config.selection.tau,
        "oracle": config.selection.tau,
        "top_k": config.selection.k,
        "random": config.selection.k,
        "cumulative": config.selection.share,
        "all": "",
    }[rule]
    shown = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
    scales = ",".join(str(si) for si in config.moe.scales)
    return f"{rule} {shown} at scales {scales} seed {config.evaluate.seed}"


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
