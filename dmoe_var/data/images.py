"""Define what every set of images offers to the stages, wherever its pixels are.

Legend: B batch, N images, R image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmoe_var.errors import InputError

Indices = Tensor | np.ndarray | Sequence[int]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read: its index in the set, its file and the reason."""

    index: int
    path: str
    reason: str


class Decoded(NamedTuple):
    """Some images: the readable ones in order, uint8 (B, R, R, 3), and the unreadable ones."""

    pixels_BRR3: np.ndarray
    unreadable: list[Unreadable]


class Images(Protocol):
    """Labelled square images, by index. Raises DataError if an image is unreadable."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    @property
    def key(self) -> str:
        """Name of the content (for caches): other files, labels, order or cuts have another key.

        It is computed when it is first asked for, for it may have to read every file.
        """
        ...

    def about(self) -> dict[str, Any]:
        """Describe the set for a record: the content's key, and how labels belong to folders."""
        ...

    def __len__(self) -> int: ...

    def pixels(self, indices: Indices) -> np.ndarray:
        """Return images, uint8 (B, R, R, 3)."""
        ...

    def tensors(self, indices: Indices, device: torch.device = CPU) -> Tensor:
        """Return images (B, 3, R, R) in [-1, 1], float32; they travel to the device as bytes."""
        ...

    def decode(self, indices: Sequence[int]) -> Decoded:
        """Do as `pixels`, in this thread, with unreadable images set aside and not refused."""
        ...


def scaled(pixels_BRR3: Tensor) -> Tensor:
    """Scale images from uint8 (B, R, R, 3) to (B, 3, R, R) in [-1, 1], float32."""
    return pixels_BRR3.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


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
    """Round images (B, 3, H, W) in [0, 1] to the nearest level, as uint8 (B, H, W, 3).

    Raise InputError for another shape or a value outside [0, 1].
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
        raise InputError(f"images must be (B, 3, H, W); got {tuple(images_B3HW.shape)}")
    x_BHW3 = images_B3HW.detach().float().cpu().permute(0, 2, 3, 1).contiguous()
    if not ((x_BHW3 >= 0) & (x_BHW3 <= 1)).all():
        low, high = x_BHW3.min().item(), x_BHW3.max().item()
        raise InputError(f"images must lie in [0, 1]; got {low:.4g} to {high:.4g}")
    return (x_BHW3 * 255).round().to(torch.uint8).numpy()
