"""Hold small data sets in memory, from the start or as they are read.

Legend: B batch, N images, R image side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmoe_var.data.images import CPU, Decoded, Images, Indices, scaled


@dataclass(frozen=True)
class ImageSet:
    """Images in memory with their labels. `key` names the content (for caches)."""

    images: np.ndarray
    """uint8 (N, R, R, 3)."""
    labels: np.ndarray
    """int64 (N,)."""
    num_classes: int
    key: str

    @classmethod
    def named(cls, name: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> ImageSet:
        """Make a set whose key is a name with a hash of the images and labels."""
        images, labels = np.ascontiguousarray(images), labels.astype(np.int64)
        content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
        return cls(images, labels, num_classes, f"{name}-{content}")

    def __len__(self) -> int:
        return len(self.images)

    def about(self) -> dict[str, Any]:
        return {"content": self.key}

    def pixels(self, indices: Indices) -> np.ndarray:
        """Return images, uint8 (B, R, R, 3)."""
        return self.images[np.asarray(indices, dtype=np.int64)]

    def tensors(self, indices: Indices, device: torch.device = CPU) -> Tensor:
        """Return images (B, 3, R, R) in [-1, 1], float32."""
        return scaled(torch.from_numpy(self.pixels(indices)).to(device))

    def decode(self, indices: Sequence[int]) -> Decoded:
        """Return images, uint8 (B, R, R, 3); none is unreadable."""
        return Decoded(self.pixels(indices), [])


class KeptImages:
    """Another set's images, each of which is read once."""

    def __init__(self, images: Images):
        self.images = images
        self.labels, self.num_classes = images.labels, images.num_classes
        self._kept_N = np.zeros(len(images), dtype=bool)
        self._pixels_NRR3: np.ndarray | None = None

    @property
    def key(self) -> str:
        return self.images.key

    def __len__(self) -> int:
        return len(self.images)

    def about(self) -> dict[str, Any]:
        return self.images.about()

    def pixels(self, indices: Indices) -> np.ndarray:
        """Return images, uint8 (B, R, R, 3)."""
        asked_B = np.asarray(indices, dtype=np.int64)
        missing = np.unique(asked_B[~self._kept_N[asked_B]])
        if len(missing):
            pixels_BRR3 = self.images.pixels(missing)
            if self._pixels_NRR3 is None:
                self._pixels_NRR3 = np.empty((len(self), *pixels_BRR3.shape[1:]), np.uint8)
            self._pixels_NRR3[missing] = pixels_BRR3
            self._kept_N[missing] = True
        if self._pixels_NRR3 is None:  # nothing was asked for yet
            return self.images.pixels(asked_B)
        kept: np.ndarray = self._pixels_NRR3[asked_B]
        return kept

    def tensors(self, indices: Indices, device: torch.device = CPU) -> Tensor:
        """Return images (B, 3, R, R) in [-1, 1], float32."""
        return scaled(torch.from_numpy(self.pixels(indices)).to(device))

    def decode(self, indices: Sequence[int]) -> Decoded:
        """Do as the other set does, for one that reads each image once anyway."""
        return self.images.decode(indices)


def spread(labels_N: np.ndarray, number: int) -> np.ndarray:
    """Choose the first images of each class, in turns, until there are `number`; return their
    indices, rising."""
    by_class = np.argsort(labels_N, kind="stable")
    sorted_N = labels_N[by_class]
    turns_N = np.empty_like(by_class)
    turns_N[by_class] = np.arange(len(labels_N)) - np.searchsorted(sorted_N, sorted_N)
    chosen: np.ndarray = np.sort(np.lexsort((labels_N, turns_N))[:number])
    return chosen
