"""Images as they are measured and stored: uint8, rounded.

Legend: B batch, N images, H W height and width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmoe_var.errors import InputError


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
