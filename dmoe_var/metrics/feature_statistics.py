"""Compute the mean and covariance of the features of a set of images, and keep them in a file.

Numbers of two networks, or of one network at two input sizes, do not compare, and nothing in them
shows it. A file of ours therefore says which network made it.

Legend: B batch, N images, D features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmoe_var.arrays import names_in, read_npz
from dmoe_var.errors import DataError, InputError

NUM_FEATURES = {"inception": 2048, "efflite0": 1280}
"""D per backbone."""
ROWS = 1024
"""Feature vectors to gather before they are added to the running covariance."""

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Network:
    """All that numbers depend on in a feature network: its name, the side in pixels to which it
    resizes images, and the SHA-256 of its weights' file."""

    backbone: str
    input_size: int
    weights_sha256: str

    def __str__(self) -> str:
        return f"{self.backbone} at {self.input_size} px, weights {self.weights_sha256[:12]}"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean `mu` (D,) and covariance `sigma` (D, D) of the features of a set, float64.

    `num_images` and `network` are None if a file does not say them: those of the ADM evaluator and
    of pytorch-fid hold mu and sigma of InceptionV3 alone.
    """

    mu: npt.NDArray[np.float64]
    sigma: npt.NDArray[np.float64]
    num_images: int | None
    network: Network | None = None

    @classmethod
    def load(cls, path: Path, network: Network) -> Statistics:
        """Read an .npz file: one of ours, or a reference file of the ADM evaluator.

        Raise DataError, naming the file, if it is missing, broken or of another layout, or not of
        `network`. Only InceptionV3's statistics, which others publish, may leave unsaid what made
        them.
        """
        mu, sigma = read_npz(path, ["mu", "sigma"])
        size = NUM_FEATURES[network.backbone]
        for key, array, expected in (("mu", mu, (size,)), ("sigma", sigma, (size, size))):
            if array.shape != expected:
                raise DataError(
                    f"{path}: {key} has shape {array.shape}; expected {expected}, the features of "
                    f"{network.backbone}"
                )
            if not (np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all()):
                raise DataError(f"{path}: {key} ({array.dtype}) is not finite floating-point")
        num_images, stored = _said_by(path)
        published = stored is None and network.backbone == "inception"
        if stored != network and not published:
            found = stored or "a network that the file does not name"
            raise DataError(
                f"{path}: statistics of {found}; fidelity is measured with {network}: give the "
                "images that they are of, or statistics of this network"
            )
        return cls(mu.astype(np.float64), sigma.astype(np.float64), num_images, stored)

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What a file holds, by name."""
        said = {} if self.network is None else asdict(self.network)
        counted = {} if self.num_images is None else {"num_images": self.num_images}
        about = {name: np.array(value) for name, value in {**counted, **said}.items()}
        return {"mu": self.mu, "sigma": self.sigma, **about}


def _said_by(path: Path) -> tuple[int | None, Network | None]:
    """Read what a file says about itself: number of images, network."""
    found = names_in(path)
    num_images = int(read_npz(path, ["num_images"])[0]) if "num_images" in found else None
    if "backbone" not in found:
        return num_images, None
    backbone, size, sha256 = read_npz(path, ["backbone", "input_size", "weights_sha256"])
    return num_images, Network(str(backbone), int(size), str(sha256))


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

    def statistics(self, network: Network | None = None) -> Statistics:
        """Return the statistics of all features added, at least 2; the divisor is N - 1."""
        if self._waiting:
            self._merge()
        return Statistics(self._mean, self._scatter / (self._count - 1), self._count, network)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Compute |mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)).

    Rounding leaves about 1e-6 around 0 for equal sets. Raise InputError if the networks differ.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if a.network is not None and b.network is not None and a.network != b.network:
        raise InputError(f"statistics of {a.network} and of {b.network} do not compare")
    metric = fid_statistics_to_metric(
        {"mu": a.mu, "sigma": a.sigma}, {"mu": b.mu, "sigma": b.sigma}, verbose=False
    )
    return float(metric[KEY_METRIC_FID])
