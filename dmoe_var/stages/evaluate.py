"""One point of a quality-cost curve: samples of a model, their FLOPs and their fidelity; or the
fidelity alone of images that are given."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmoe_var.conversion.pruning import kept_neurons, mean_activations, prune
from dmoe_var.data.image_sets import ImageArray, ImageFolder, Pixels, all_pixels
from dmoe_var.data.images import Images
from dmoe_var.data.token_cache import TokenSet
from dmoe_var.distributed import from_main, is_main, rank, world_size
from dmoe_var.errors import DataError
from dmoe_var.experiment.contents import hash_of
from dmoe_var.experiment.graph import StageResult
from dmoe_var.experiment.work import Work
from dmoe_var.files import note, write_text
from dmoe_var.metrics.agreement import LabelAgreement
from dmoe_var.metrics.fidelity import Fidelity
from dmoe_var.metrics.flops import fixed_cost, report
from dmoe_var.metrics.image_files import IMAGES, labels_of, open_images
from dmoe_var.metrics.reference import HASHES, Reference, load_reference
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.sampling.draw import Drawing, Samples, balanced_labels
from dmoe_var.sampling.store import Drawn, StoredDrawing
from dmoe_var.stages import loaded
from dmoe_var.stages.loaded import image_sets, token_sets

T = TypeVar("T")

PRUNING_FILE = "pruning.json"
IMAGES_AT_ONCE = 16
"""Training images whose activations are in memory together."""


@dataclass(frozen=True)
class Pruned:
    """A pruned VAR, and the neurons of each layer that it kept, rising."""

    var: VAR
    kept: list[list[int]]


@dataclass(frozen=True)
class Bench:
    """What the points of a sweep share: models, reference statistics, classifier. Made once.

    The models are those of a point's own work, so that points of different depths or experts can
    share a bench; of each kind the latest is kept, and all means that neurons were pruned by. All
    else is that of the bench's work.
    """

    work: Work
    _latest: dict[Hashable, tuple[object, Any]] = field(
        default_factory=dict, init=False, repr=False
    )
    """By kind: what the model was made of, and the model."""

    @property
    def vqvae(self) -> VQVAE:
        return self.vqvae_of(self.work)

    @property
    def dense(self) -> VAR:
        return self.var_of(self.work, "train_var")

    @property
    def experts(self) -> VAR:
        return self.var_of(self.work, "train_router")

    def vqvae_of(self, work: Work) -> VQVAE:
        """The tokenizer of a point."""
        dtype = work.config.sampling.torch_dtype
        key = (work.fingerprint_of_model("train_vqvae"), dtype)
        return self._made("vqvae", key, lambda: loaded.vqvae(work).to(dtype))

    def var_of(self, work: Work, stage: str) -> VAR:
        """The VAR of a point as a stage left it: dense, sparse, or split into experts."""
        dtype = work.config.sampling.torch_dtype
        kind = "experts" if stage in ("split", "train_router") else stage
        key = (stage, work.fingerprint_of_model(stage), dtype)
        return self._made(kind, key, lambda: loaded.var(work, stage).to(dtype))

    def pruned_of(self, work: Work) -> Pruned:
        """The pruned VAR of a point and what was kept of it. Called by all processes at once."""
        pruning, scales = work.config.pruning, work.config.moe.scales
        (stage,) = work.needs("evaluate")
        of_means = (pruning.rule, pruning.images, scales, work.config.sampling.torch_dtype)
        key = (stage, work.fingerprint_of_model(stage), *of_means)
        var = self.var_of(work, stage)
        means = self._made(("means", *key), key, lambda: self._mean_activations(work, var))

        def make() -> Pruned:
            kept = [kept_neurons(means_H, pruning.share).tolist() for means_H in means]
            return Pruned(prune(var, pruning.share, means), kept)

        return self._made("pruned", (*key, pruning.share), make)

    def _mean_activations(self, work: Work, var: VAR) -> list[Tensor]:
        """Over training images that lie evenly over the set, which may be sorted by class."""
        vqvae, pruning = loaded.vqvae(work), work.config.pruning
        tokens, _ = token_sets(work, vqvae)
        num_images = min(pruning.images, len(tokens))
        indices = torch.arange(num_images) * len(tokens) // num_images
        batches = indices.split(IMAGES_AT_ONCE)[rank() :: world_size()]
        inputs = _teacher_inputs(tokens, batches, vqvae, work.device)
        signed = pruning.rule == "mean_signed"
        return mean_activations(var, inputs, work.config.moe.scales, signed)

    def _made(self, kind: Hashable, key: object, make: Callable[[], T]) -> T:
        """The latest of a kind where it has the same key, else a new one in its place."""
        if kind not in self._latest or self._latest[kind][0] != key:
            self._latest.pop(kind, None)  # its memory before the new one's
            self._latest[kind] = (key, make())
        made: T = self._latest[kind][1]
        return made

    @cached_property
    def training_images(self) -> Images:
        return image_sets(self.work)[0]

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
        """The model of a point: the dense VAR, or dense and another joined at its scales."""
        config, dense = work.config, self.var_of(work, "train_var")
        if config.evaluate.model == "dense":
            return dense
        if config.evaluate.model == "pruned":
            return DynamicVAR(dense, self.pruned_of(work).var, config.moe.scales)
        (stage,) = work.needs("evaluate")
        return DynamicVAR(dense, self.var_of(work, stage), config.moe.scales)

    def drawing(self, work: Work) -> Drawing:
        """How a point's images are drawn: as many of each class, from its seed."""
        config = work.config
        classes, num_samples = self._classes(work), config.evaluate.num_samples
        if num_samples % len(classes) and is_main():
            note(
                f"evaluate.num_samples={num_samples} is no multiple of {len(classes)} classes: "
                "some have an image more than others"
            )
        return Drawing(
            self.model(work),
            self.vqvae_of(work),
            classes[balanced_labels(num_samples, len(classes))],
            config.evaluate.seed,
            config.sampling,
            config.selection.rules() if config.evaluate.model == "dynamic" else None,
            config.moe.impl,
        )

    def _classes(self, work: Work) -> npt.NDArray[np.int64]:
        """All of the model's classes; of images that are compared with the training pictures,
        those that these show."""
        config = work.config
        if config.data.kind == "image_folder" and config.fidelity.reference is None:
            return np.unique(self.training_images.labels)
        return np.arange(config.var.num_classes)


def run(work: Work, bench: Bench | None = None) -> StageResult:
    """Draw with all processes, measure with the main one; the result is every process's.

    `bench` is shared by the points of a sweep.
    """
    bench = bench or Bench(work)
    config = work.config
    if config.evaluate.samples is not None:
        measured = from_main(_measure_given(work, bench) if is_main() else None)
        assert measured is not None
        return measured
    if is_main():
        _ = bench.reference  # what is wrong with it ends the run before images are drawn
    folder = work.folder("evaluate")
    drawing = bench.drawing(work)
    stored = StoredDrawing(
        drawing,
        folder,
        hash_of({"images": work.fingerprint_of_images(), "labels": drawing.labels.tolist()}),
        config.evaluate.format,
        tuple(sorted(other for other in folder.parent.glob("*") if other != folder)),
    )
    drawn = stored.draw(describe(work) if config.progress else None)
    result = from_main(_measure(work, bench, stored, drawn) if is_main() else None)
    assert result is not None
    return result


def _measure(work: Work, bench: Bench, stored: StoredDrawing, drawn: Drawn) -> StageResult:
    config, drawing = work.config, stored.drawing
    num_images, guided = len(drawing.labels), config.sampling.cfg != 0
    shared = config.sampling.share_mask
    fixed = fixed_cost(drawing.model, drawing.vqvae, guided, share_mask=shared)
    flops = report(fixed, drawn.ran, drawing.rules)
    fidelity, compared = _compare(bench, _stored_images(stored), drawing.labels)
    sampling_ms = 1000 * drawn.seconds / num_images
    metrics = {**flops.metrics(), **fidelity, "sampling_ms_per_image": sampling_ms}
    edges, counts = flops.histogram()
    about = {
        "samples": stored.place,
        "guidance": flops.guided,
        "flops_histogram": {"edges_gmac": list(edges), "images": list(counts)},
        **compared,
    }
    if config.data.kind == "image_folder" and config.fidelity.reference is None:
        about["data"] = bench.training_images.about()
    if config.evaluate.model == "pruned":
        about |= _write_pruning(work, bench.pruned_of(work))  # kept since it was drawn from
    dtype = str(next(drawing.model.parameters()).dtype).removeprefix("torch.")
    return StageResult(metrics, num_images, about, config.evaluate.seed, dtype)


def _measure_given(work: Work, bench: Bench) -> StageResult:
    """Of images that somebody else drew; no model is loaded, and nothing said about FLOPs."""
    config, hashes = work.config, work.cache / HASHES
    path = Path(config.evaluate.samples or "").expanduser()
    size = config.data.image_size
    found = open_images("evaluate.samples", path, size, hashes, images_too=True)
    if found.images is None:
        raise DataError(f"evaluate.samples={path}: holds statistics and no images ({IMAGES})")
    metrics, compared = _compare(bench, found.images, labels_of(found))
    found.check_unchanged(hashes)
    about = {"given": str(path), "given_sha256": found.sha256, **compared}
    return StageResult(metrics, len(found.images), about)


def _compare(
    bench: Bench, images: Pixels, labels: npt.NDArray[np.int64] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of images against the reference, and of their labels where there are some; what a
    record says of how they were measured."""
    reference, agreement = bench.reference, None if labels is None else bench.agreement
    metrics = bench.fidelity.score(
        images,
        reference.statistics,
        reference.features_MD,
        progress=bench.work.config.progress,
    )
    if agreement is not None and labels is not None:
        metrics = {**metrics, "label_agreement": agreement.accuracy(all_pixels(images), labels)}
    return metrics, {
        "fidelity": bench.fidelity.name,
        "fidelity_weights_sha256": bench.fidelity.weights_sha256,
        **reference.about,
    }


def _teacher_inputs(
    tokens: TokenSet, batches: Sequence[Tensor], vqvae: VQVAE, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels (B,) and teacher input (B, L - 1, Cvae) of the images of each batch of indices."""
    for indices_B in batches:
        tokens_BL, labels_B = tokens.batch(indices_B)
        yield labels_B.to(device), vqvae.teacher_input(tokens.by_scale(tokens_BL.to(device)))


def _write_pruning(work: Work, pruned: Pruned) -> dict[str, Any]:
    """Leaves pruning.json beside the record: the neurons that stay, by layer."""
    content = {"hidden": work.config.var.hidden, "kept": pruned.kept}
    write_text(work.folder("evaluate") / PRUNING_FILE, json.dumps(content) + "\n")
    return {"pruning": PRUNING_FILE, "kept_neurons": len(pruned.kept[0])}


def _stored_images(stored: StoredDrawing) -> Pixels:
    """The images that were drawn, read from the disk as they are used."""
    if stored.format == "png":
        files = tuple(stored.png_path(index) for index in range(len(stored.drawing.labels)))
        return ImageFolder(stored.folder, stored.drawing.image_size, files)
    return ImageArray(Samples.load(stored.folder / stored.place).images)


def describe(work: Work) -> str:
    """A point in a few words."""
    config = work.config
    if config.evaluate.samples is not None:
        return f"images of {config.evaluate.samples}"
    scales = ",".join(str(si) for si in config.moe.scales)
    if config.evaluate.model == "dense":
        return f"dense seed {config.evaluate.seed}"
    if config.evaluate.model == "pruned":
        how = f"{config.pruning.model} pruned by {config.pruning.share:g} ({config.pruning.rule})"
        return f"{how} at scales {scales} seed {config.evaluate.seed}"
    return f"{config.selection.text} at scales {scales} seed {config.evaluate.seed}"
