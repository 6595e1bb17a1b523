"""Load scikit-learn's handwritten digits, enlarged: real images that need no download.

Legend: N images, R image side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe_var.data.images import Decoded, Indices, scaled

NUM_CLASSES = 10
TEST_SHARE = 0.2


@dataclass(frozen=True)
class ImageSet:
    """Images in memory with their labels. `key` names the content (for caches)."""

    images: np.ndarray
    """uint8 (N, R, R, 3)."""
    labels: np.ndarray
    """int64 (N,)."""
    num_classes: int
    key: str

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


def load_digits(image_size: int) -> tuple[ImageSet, ImageSet]:
    """Load training (1,437) and test images (360), a fixed stratified split.

    The 8 x 8 originals (grey levels 0..16) are enlarged bicubically, rounded to uint8 and
    repeated over three channels.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    grey_N88, labels_N = sklearn_digits(return_X_y=True)
    grey_N1 = torch.from_numpy(grey_N88.reshape(-1, 1, 8, 8)).double() / 16
    size = (image_size, image_size)
    large = F.interpolate(grey_N1, size=size, mode="bicubic").clamp(0, 1)
    images = (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    chosen = train_test_split(
        np.arange(len(images)), test_size=TEST_SHARE, random_state=0, stratify=labels_N
    )
    sets = []
    for name, indices in zip(("train", "test"), chosen, strict=True):
        part, labels = np.ascontiguousarray(images[indices]), labels_N[indices].astype(np.int64)
        content = hashlib.sha256(part.tobytes() + labels.tobytes()).hexdigest()[:16]
        sets.append(ImageSet(part, labels, NUM_CLASSES, f"digits-{name}-{image_size}-{content}"))
    return sets[0], sets[1]
