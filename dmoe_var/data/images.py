"""What every set of images offers to the stages, wherever its pixels are.

Legend: B batch, N images, R image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Indices = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be had: its index in the set, its file, why."""

    index: int
    path: str
    reason: str


class Decoded(NamedTuple):
    """Some images: uint8 (B, R, R, 3) of those that are readable, in order, and the others."""

    pixels_BRR3: np.ndarray
    unreadable: list[Unreadable]


class Images(Protocol):
    """Labelled square images, by index. DataError where an image is unreadable."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        ...

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        ...

    @property
    def key(self) -> str:
        """Names the content (for caches): other files, labels, order or cuts have another key.

        It may have to read every file: it is computed when it is first asked for.
        """
        ...

    def about(self) -> dict[str, Any]:
        """For a record: the content's key, and how labels belong to folders."""
        ...

    def __len__(self) -> int: ...

    def pixels(self, indices: Indices) -> np.ndarray:
        """Images uint8 (B, R, R, 3)."""
        ...

    def tensors(self, indices: Indices) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1], float32."""
        ...

    def decode(self, indices: Sequence[int]) -> Decoded:
        """As `pixels`, in this thread, with unreadable images set aside instead of refused."""
        ...


def scaled(pixels_BRR3: Tensor) -> Tensor:
    """Images (B, 3, R, R) in [-1, 1], float32, of uint8 (B, R, R, 3)."""
    return pixels_BRR3.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
