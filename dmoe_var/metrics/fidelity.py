"""FID and inception score of generated images, through torch-fidelity.

A feature network turns every image into a vector; the Frechet distance between Gaussians fitted
to two sets of vectors is the FID (arXiv 1706.08500). With InceptionV3 that is the published
measure, named `fid`. EfficientNet-Lite0 comes with a package and needs no download; its numbers
compare only with each other, so they are named after the network and the size of its input, for
example `fid_efflite0_64px`.

Legend: B batch, N images, H W height and width, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from tqdm import tqdm

from dmoe_var.errors import CheckpointError, DataError, InputError
from dmoe_var.metrics.images import check_images

if TYPE_CHECKING:  # imported where it is used: it takes seconds, and sampling does without
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

INCEPTION = "inception-v3-compat"
"""torch-fidelity's name of the InceptionV3 whose weights are those of the published FID."""
ISC_SPLITS = 10
"""Parts of the sample that the inception score's mean and deviation are taken over."""


@dataclass(frozen=True)
class FidelityConfig:
    """Which network measures fidelity, and how.

    `input_size` (pixels a side that EfficientNet-Lite0 sees) is read by the backbone efflite0
    only; `weights` (a local file of torch-fidelity's InceptionV3; None: torch-fidelity downloads
    it) by inception only.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    backbone: Literal["efflite0", "inception"] = "efflite0"
    input_size: Annotated[int, Field(ge=32)] = 64
    batch_size: Annotated[int, Field(gt=0)] = 64
    weights: str | None = None


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
    def of(cls, features_ND: npt.NDArray[np.float32]) -> Statistics:
        """Statistics of features (N, D), N > 1, summed in float64."""
        from torch_fidelity.metric_fid import fid_features_to_statistics

        statistics = fid_features_to_statistics(torch.from_numpy(features_ND).double())
        return cls(statistics["mu"], statistics["sigma"], len(features_ND))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read an .npz file: one of ours, or a reference file of the ADM evaluator.

        Raises DataError, naming the file, where it is missing, broken or of another layout.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
                num_images = int(file["num_images"]) if "num_images" in file else None
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a readable statistics file: {error}") from error
        if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
            raise DataError(f"{path}: mu {mu.shape} and sigma {sigma.shape} do not fit together")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DataError(f"{path}: mu or sigma is not finite")
        return cls(mu, sigma, num_images)

    def save(self, path: Path) -> None:
        """Write an .npz file; it appears under its name only when it is complete."""
        arrays = {"mu": self.mu, "sigma": self.sigma}
        if self.num_images is not None:
            arrays["num_images"] = np.array(self.num_images)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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


class Fidelity:
    """Compares sets of images; every set is uint8 (N, H, W, 3)."""

    def __init__(self, config: FidelityConfig, device: torch.device | str = "cpu"):
        """Raises CheckpointError where InceptionV3's weights are missing or not its own."""
        self.config = config
        self.device = torch.device(device)
        self._extractor = _create_extractor(config).to(self.device)

    @property
    def name(self) -> str:
        """Name of the distance in records: `fid` is InceptionV3's alone."""
        if self.config.backbone == "inception":
            return "fid"
        return f"fid_efflite0_{self.config.input_size}px"

    def features(
        self, images: npt.NDArray[np.uint8], *, progress: bool = False
    ) -> npt.NDArray[np.float32]:
        """Feature vectors (N, D), float32; D is 1280 (efflite0) or 2048 (inception)."""
        features: npt.NDArray[np.float32] = self._layers(images, progress)[0].numpy()
        return features

    def statistics(self, images: npt.NDArray[np.uint8], *, progress: bool = False) -> Statistics:
        """Mean and covariance of the features. Raises InputError for fewer than 2 images."""
        check_images(images, at_least=2)
        return Statistics.of(self.features(images, progress=progress))

    def reference(
        self, images: npt.NDArray[np.uint8], cache_dir: Path, key: str, *, progress: bool = False
    ) -> Statistics:
        """The statistics of a reference set, computed once and then read from `cache_dir`.

        `key` names the set (data set, split, size): other images need another key. Raises
        DataError where the cached file is broken or of another number of images.
        """
        check_images(images, at_least=2)
        identity = json.dumps({"key": key, "weights": self.config.weights})
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        path = Path(cache_dir) / f"{self.name}_{digest}.npz"
        if not path.exists():
            self.statistics(images, progress=progress).save(path)
        statistics = Statistics.load(path)
        if statistics.num_images != len(images):
            found = f"{path} is of {statistics.num_images} images, {key!r} has {len(images)}"
            raise DataError(f"{found}: give another key or delete the file")
        return statistics

    def score(
        self, images: npt.NDArray[np.uint8], reference: Statistics, *, progress: bool = False
    ) -> dict[str, float]:
        """Metrics of generated images: the FID under `name`, and with inception the inception
        score as `inception_score_mean` and `inception_score_std` (over 10 parts, shuffled).

        Raises InputError for fewer than 2 images (inception: 10) or a reference of another D.
        """
        inception = self.config.backbone == "inception"
        check_images(images, at_least=ISC_SPLITS if inception else 2)
        layers = self._layers(images, progress)
        metrics = {self.name: frechet_distance(Statistics.of(layers[0].numpy()), reference)}
        if inception:
            from torch_fidelity.metric_isc import isc_features_to_metric

            metrics |= isc_features_to_metric(layers[1], splits=ISC_SPLITS)
        return metrics

    def _layers(self, images: npt.NDArray[np.uint8], progress: bool) -> list[Tensor]:
        """On the CPU: the features (N, D), and with inception the logits (N, 1008) too."""
        check_images(images)
        starts = range(0, len(images), self.config.batch_size)
        batches = []
        with torch.inference_mode():
            for start in tqdm(starts, desc=self.name, unit="batch", disable=not progress):
                batch_BHW3 = torch.from_numpy(images[start : start + self.config.batch_size].copy())
                layers = self._extractor(batch_BHW3.to(self.device).permute(0, 3, 1, 2))
                batches.append([layer.cpu() for layer in layers])
        return [torch.cat(layer) for layer in zip(*batches, strict=True)]


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
