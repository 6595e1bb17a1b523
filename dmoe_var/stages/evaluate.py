"""One point of a quality-cost curve: samples of a model, their FLOPs and their fidelity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dmoe_var.data import load_data
from dmoe_var.data.images import Images
from dmoe_var.metrics.agreement import LabelAgreement
from dmoe_var.metrics.fidelity import Fidelity
from dmoe_var.metrics.flops import fixed_cost, report
from dmoe_var.metrics.image_sets import ImageArray, ImageFolder, Pixels, all_pixels
from dmoe_var.metrics.reference import Reference, load_reference
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.sampling.draw import Drawing, Samples, balanced_labels
from dmoe_var.sampling.memory import keep_freed_memory
from dmoe_var.sampling.parts import Drawn, StoredDrawing
from dmoe_var.stages import models
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.work import Work
from dmoe_var.training.distributed import from_main, is_main


@dataclass(frozen=True)
class Bench:
    """What all points of a sweep share: models, reference statistics, classifier. Made once."""

    work: Work

    def __post_init__(self) -> None:
        keep_freed_memory()

    @cached_property
    def vqvae(self) -> VQVAE:
        return models.vqvae(self.work).to(self.work.config.sampling.torch_dtype)

    @cached_property
    def dense(self) -> VAR:
        return models.dense(self.work).to(self.work.config.sampling.torch_dtype)

    @cached_property
    def experts(self) -> VAR:
        return models.split(self.work).to(self.work.config.sampling.torch_dtype)

    @cached_property
    def training_images(self) -> Images:
        return load_data(self.work.config.data)[0]

    @cached_property
    def fidelity(self) -> Fidelity:
        return Fidelity(self.work.config.fidelity, self.work.device)

    @cached_property
    def reference(self) -> Reference:
        config = self.work.config
        return load_reference(
            self.fidelity,
            lambda: self.training_images,
            config.data.image_size,
            self.work.cache / "fidelity",
            progress=config.progress,
        )

    @cached_property
    def agreement(self) -> LabelAgreement | None:
        """The classifier of digits; None for other data, of which it knows nothing."""
        if self.work.config.data.kind != "digits":
            return None
        return LabelAgreement(all_pixels(self.training_images), self.training_images.labels)

    def model(self, work: Work) -> VAR | DynamicVAR:
        """The model of a point: the dense VAR, or dense and experts joined at its scales."""
        if work.config.evaluate.model == "dense":
            return self.dense
        return DynamicVAR(self.dense, self.experts, work.config.moe.scales)

    def drawing(self, work: Work) -> Drawing:
        """How a point's images are drawn: as many of each class, from its seed."""
        config = work.config
        model = self.model(work)
        return Drawing(
            model,
            self.vqvae,
            balanced_labels(config.evaluate.num_samples, config.var.num_classes),
            config.evaluate.seed,
            config.sampling,
            config.selection.rules() if isinstance(model, DynamicVAR) else None,
            config.moe.impl,
        )


def run(work: Work, bench: Bench | None = None) -> StageResult:
    """Draw with all processes, measure with the main one; the result is every process's.

    `bench` is shared by the points of a sweep.
    """
    bench = bench or Bench(work)
    config = work.config
    if is_main():
        _ = bench.reference  # what is wrong with it ends the run before images are drawn
    stored = StoredDrawing(
        bench.drawing(work),
        work.folder("evaluate"),
        work.fingerprint("evaluate"),
        config.evaluate.format,
    )
    drawn = stored.draw(describe(work) if config.progress else None)
    result = from_main(_measure(work, bench, stored, drawn) if is_main() else None)
    assert result is not None
    return result


def _measure(work: Work, bench: Bench, stored: StoredDrawing, drawn: Drawn) -> StageResult:
    config, drawing, reference = work.config, stored.drawing, bench.reference
    num_images, guided = len(drawing.labels), config.sampling.cfg != 0
    fixed = fixed_cost(drawing.model, drawing.vqvae, guided)
    flops = report(fixed, drawn.pairs, drawing.rules, num_images)
    images = _stored_images(stored)
    fidelity = bench.fidelity.score(
        images, reference.statistics, reference.features_MD, progress=config.progress
    )
    metrics = {
        **flops.metrics(),
        **fidelity,
        "sampling_ms_per_image": 1000 * drawn.seconds / num_images,
    }
    if bench.agreement is not None:
        seen = bench.agreement.accuracy(all_pixels(images), drawing.labels)
        metrics["label_agreement"] = seen
    about = {
        "samples": stored.place,
        "fidelity": bench.fidelity.name,
        "fidelity_weights_sha256": bench.fidelity.weights_sha256,
        **reference.about,
    }
    dtype = str(next(drawing.model.parameters()).dtype).removeprefix("torch.")
    return StageResult(metrics, num_images, about, config.evaluate.seed, dtype)


def _stored_images(stored: StoredDrawing) -> Pixels:
    """The images that were drawn, read from the disk as they are used."""
    if stored.format == "png":
        files = tuple(stored.png_path(index) for index in range(len(stored.drawing.labels)))
        return ImageFolder(stored.folder, stored.drawing.image_size, files)
    return ImageArray(Samples.load(stored.folder / stored.place).images)


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
