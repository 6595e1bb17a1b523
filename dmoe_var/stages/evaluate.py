"""Evaluate one point of a quality-cost curve: sample images, count their FLOPs and measure their
fidelity. For images that are given, measure fidelity alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmoe_var.config.root import Config
from dmoe_var.data.image_sets import ImageArray, ImageFolder, Pixels, all_pixels
from dmoe_var.data.images import Images
from dmoe_var.distributed import from_main, is_main
from dmoe_var.errors import ConfigError, DataError
from dmoe_var.experiment.contents import hash_of
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import vary
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.files import note
from dmoe_var.metrics.agreement import Classifier, LabelAgreement, NetworkAgreement
from dmoe_var.metrics.fidelity import Fidelity
from dmoe_var.metrics.flops import fixed_cost, report
from dmoe_var.metrics.image_files import IMAGES, labels_of, open_images
from dmoe_var.metrics.reference import HASHES, Reference, load_reference
from dmoe_var.models.collaborative_var import AnyVAR
from dmoe_var.models.int8 import in_precision
from dmoe_var.sampling.draw import Drawing, Samples, balanced_labels
from dmoe_var.sampling.store import Drawn, StoredDrawing
from dmoe_var.stages.parts import loaded, skipping
from dmoe_var.stages.parts.loaded import Models, check_drafter, drafter_keys, image_sets
from dmoe_var.stages.parts.model_kinds import kind_of
from dmoe_var.stages.parts.on_device import check_sampling

MEASURING = ("fidelity", "evaluate.format", "train_classifier", "base.classifier")
"""Keys, and the stage, that say how images are measured or stored, not which they are."""


@dataclass(frozen=True)
class Bench(Models):
    """Shared by the points of a sweep: models, reference statistics, classifier, each made once.
    Models are looked up by a point's own work; all else comes from the bench's work."""

    @cached_property
    def image_sets(self) -> tuple[Images, Images]:
        return image_sets(self.experiment)

    @property
    def training_images(self) -> Images:
        return self.image_sets[0]

    @cached_property
    def reference_images(self) -> Images:
        """The training images without those that are mirrored."""
        data = self.experiment.config.data
        if not data.flip:
            return self.training_images
        upright = {"data.flip": False, "data.augmentations": (data.augmentations + 1) // 2}
        return image_sets(vary(self.experiment, upright))[0]

    @cached_property
    def fidelity(self) -> Fidelity:
        return Fidelity(self.experiment.config.fidelity, self.experiment.device)

    @cached_property
    def reference(self) -> Reference:
        config = self.experiment.config
        return load_reference(
            self.fidelity,
            lambda: self.reference_images,
            config.data.image_size,
            self.experiment.cache / "fidelity",
            progress=config.progress,
        )

    @cached_property
    def agreement(self) -> Classifier | None:
        """What sees labels: a trained network if one is asked for, else the classifier of digits;
        None for other data, of which that knows nothing."""
        config = self.experiment.config
        if config.fidelity.classifier is not None:
            network = loaded.classifier(self.experiment)
            return NetworkAgreement(network, self.image_sets[1], config.fidelity.batch_size)
        if config.data.kind != "digits":
            return None
        return LabelAgreement(all_pixels(self.training_images), self.training_images.labels)

    def model(self, experiment: Experiment) -> AnyVAR:
        """Load the model of a point: the dense VAR, or dense and another joined at its scales, with
        its drafter if it has one."""
        return self.drafted(experiment, kind_of(experiment.config).load(self, experiment))

    def drawing(self, experiment: Experiment) -> Drawing:
        """Set up the sampling of a point's images: balanced over classes, from the point's seed."""
        config = experiment.config
        classes, num_samples = self._classes(experiment), config.evaluate.num_samples
        if num_samples % len(classes) and is_main():
            note(
                f"evaluate.num_samples={num_samples} is no multiple of {len(classes)} classes: "
                "some have an image more than others"
            )
        model = self.model(experiment)
        return Drawing(
            in_precision(model, config.sampling.int8),
            self.vqvae_of(experiment),
            classes[balanced_labels(num_samples, len(classes))],
            config.evaluate.seed,
            config.sampling,
            **kind_of(config).sampled_by(config),
        )

    def _classes(self, experiment: Experiment) -> npt.NDArray[np.int64]:
        """List the classes to sample: all of the model's or, if images are compared with the
        training pictures of a folder, those that these show."""
        config = experiment.config
        if config.data.kind == "image_folder" and config.fidelity.reference is None:
            return np.unique(self.training_images.labels)
        return np.arange(config.var.num_classes)


def run(experiment: Experiment, bench: Bench | None = None) -> StageResult:
    """Sample with all processes and measure with the main one. Every process gets the result.

    `bench` is shared by the points of a sweep.
    """
    bench = bench or Bench(experiment)
    config = experiment.config
    if config.evaluate.samples is not None:
        return from_main(_measure_given(experiment, bench) if is_main() else StageResult({}))
    if is_main():
        _ = bench.reference  # a fault in it ends the run before images are sampled
    folder = experiment.folder("evaluate")
    drawing = bench.drawing(experiment)
    images = experiment.fingerprint_of_images("evaluate", MEASURING)
    stored = StoredDrawing(
        drawing,
        folder,
        hash_of({"images": images, "labels": drawing.labels.tolist()}),
        config.evaluate.format,
        tuple(sorted(other for other in folder.parent.glob("*") if other != folder)),
    )
    drawn = stored.draw(describe(experiment) if config.progress else None)
    return from_main(_measure(experiment, bench, stored, drawn) if is_main() else StageResult({}))


def _measure(
    experiment: Experiment, bench: Bench, stored: StoredDrawing, drawn: Drawn
) -> StageResult:
    config, drawing = experiment.config, stored.drawing
    num_images = len(drawing.labels)
    # A multiply-add counts the same in 8 bits, but no tracer sees into those.
    counted = drawing.model if config.sampling.int8 == "none" else bench.model(experiment)
    fixed = fixed_cost(counted, drawing.vqvae, **config.sampling.counted)
    flops = report(fixed, drawn.ran, drawing.rules)
    fidelity, compared = _compare(bench, _stored_images(stored), drawing.labels)
    sampling_ms = 1000 * drawn.seconds / num_images
    metrics = {**flops.metrics(), **fidelity, "sampling_ms_per_image": sampling_ms}
    edges, counts = flops.histogram()
    about = {
        "samples": stored.place,
        "guidance": 2 in fixed.branches,
        "flops_histogram": {"edges_gmac": list(edges), "images": list(counts)},
        **compared,
    }
    if config.data.kind == "image_folder" and config.fidelity.reference is None:
        about["data"] = bench.training_images.about()
    about |= kind_of(config).about(bench, experiment)
    dtype = str(next(drawing.model.parameters()).dtype).removeprefix("torch.")
    return StageResult(metrics, num_images, about, config.evaluate.seed, dtype)


def _measure_given(experiment: Experiment, bench: Bench) -> StageResult:
    """Measure given images. No model is loaded, and nothing is said about FLOPs."""
    config, hashes = experiment.config, experiment.cache / HASHES
    path = Path(config.evaluate.samples or "").expanduser()
    size = config.data.image_size
    found = open_images("evaluate.samples", path, size, hashes, images_too=True)
    if found.images is None:
        raise DataError(f"evaluate.samples={path}: holds statistics and no images ({IMAGES})")
    labels = labels_of(found)
    if labels is not None and bench.agreement is not None:
        _check_classes(path, labels, config.var.num_classes)
    metrics, compared = _compare(bench, found.images, labels)
    found.check_unchanged(hashes)
    about = {"given": str(path), "given_sha256": found.sha256, **compared}
    return StageResult(metrics, len(found.images), about)


def _check_classes(path: Path, labels: npt.NDArray[np.int64], num_classes: int) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(
            f"evaluate.samples={path}: its classes are {labels.min()}..{labels.max()}; allowed: "
            f"0..{num_classes - 1}"
        )


def _compare(
    bench: Bench, images: Pixels, labels: npt.NDArray[np.int64] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure images against the reference, and their labels if there are any. Return the metrics,
    and what a record says of how they were measured."""
    reference, progress = bench.reference, bench.experiment.config.progress
    metrics = bench.fidelity.score(
        images, reference.statistics, reference.features_MD, progress=progress
    )
    by: dict[str, Any] = {}
    if labels is not None and bench.agreement is not None:
        accuracy = bench.agreement.accuracy(images, labels)
        metrics, by = {**metrics, "label_agreement": accuracy}, bench.agreement.about
    return metrics, {
        "fidelity": bench.fidelity.name,
        "fidelity_weights_sha256": bench.fidelity.weights_sha256,
        **reference.about,
        **by,
    }


def _stored_images(stored: StoredDrawing) -> Pixels:
    """Open the sampled images, which are read from the disk as they are used."""
    if stored.format == "png":
        files = tuple(stored.png_path(index) for index in range(len(stored.drawing.labels)))
        return ImageFolder(stored.folder, stored.drawing.image_size, files)
    return ImageArray(Samples.load(stored.folder / stored.place).images)


def describe(experiment: Experiment) -> str:
    """Describe a point in a few words."""
    config = experiment.config
    if config.evaluate.samples is not None:
        return f"images of {config.evaluate.samples}"
    drafter = config.drafter
    drafted = "" if drafter.var is None else f" after {drafter.scales} scales of {drafter.var}"
    return f"{kind_of(config).text(config)}{drafted} seed {config.evaluate.seed}"


def refuse_given_samples(config: Config) -> None:
    """Raise ConfigError for given images in a stage that measures points of its own."""
    if config.evaluate.samples is not None:
        raise ConfigError(
            f"evaluate.samples={config.evaluate.samples}: images that are given are measured by "
            "scripts/evaluate.py alone; allowed here: null"
        )


def refuse(config: Config) -> None:
    """Raise ConfigError for settings with which fidelity cannot be measured."""
    samples = config.evaluate.samples
    if samples is not None and not Path(samples).expanduser().exists():
        raise ConfigError(
            f"evaluate.samples={samples}: no such file or folder; allowed: null, an .npz file of "
            "images (arr_0), a folder of images"
        )
    if config.evaluate.model != "dense":
        check_drafter(config)
    if samples is None:
        check_sampling(config, config.evaluate.model == "dynamic")
    if config.sampling.more_smooth:
        raise ConfigError(
            "sampling.more_smooth=true is for pictures (scripts/sample.py) alone: fidelity is "
            "measured on images that were drawn without it; allowed here: false"
        )
    if config.evaluate.model != "dynamic" and samples is None:
        skipping.refuse_router(config, f"evaluate.model={config.evaluate.model}")
    reference = config.fidelity.reference
    if reference is None and config.data.unreadable == "skip":
        raise ConfigError(
            "fidelity.reference=null compares with all training pictures, data.unreadable=skip "
            "leaves some out; allowed: a reference file or folder, or data.unreadable=refuse"
        )
    if reference is not None and not Path(reference).expanduser().exists():
        raise ConfigError(
            f"fidelity.reference={reference}: no such file or folder; allowed: null, an .npz "
            "reference file, a folder of images"
        )


def reads(config: Config, ours: Config) -> Keys:
    """A point reads what its kind of model does; given images depend on no model."""
    if ours.evaluate.samples is not None:
        return ("data", "var.num_classes", "evaluate.samples", "fidelity")
    models = (*kind_of(config).reads, *drafter_keys(config))
    return (*models, "sampling", "evaluate", "fidelity")


def needs(config: Config) -> Keys:
    models = kind_of(config).needs(config) if config.evaluate.samples is None else ()
    return (*models, *needs_classifier(config))


def needs_classifier(config: Config) -> Keys:
    """Name the stage of the network that sees labels, if one is asked for."""
    return () if config.fidelity.classifier is None else ("train_classifier",)


STAGE = Stage("evaluate", run, reads, needs, refuse=refuse, compares=True)
