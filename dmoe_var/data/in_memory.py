"""Hold a small data set in memory.

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

from dmoe_var.data.images import Decoded, Indices, scaled


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

    def tensors(self, indices: Indices) -> Tensor:
        """Return images (B, 3, R, R) in [-1, 1], float32."""
        return scaled(torch.from_numpy(self.pixels(indices)))

    def decode(self, indices: Sequence[int]) -> Decoded:
        """Return images, uint8 (B, R, R, 3); none is unreadable."""
        return Decoded(self.pixels(indices), [])


def spread(labels_N: np.ndarray, number: int) -> np.ndarray:
    """Choose the first images of each class, in turns, until there are `number`; return their
    indices, rising."""
    by_class = np.argsort(labels_N, kind="stable")
    sorted_N = labels_N[by_class]
    turns_N = np.empty_like(by_class)
    turns_N[by_class] = np.arange(len(labels_N)) - np.searchsorted(sorted_N, sorted_N)
    chosen: np.ndarray = np.sort(np.lexsort((labels_N, turns_N))[:number])
    return chosen
