"""Load scikit-learn's handwritten digits, enlarged: real images that need no download.

Legend: N images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dmoe_var.data.in_memory import ImageSet

NUM_CLASSES = 10
TEST_SHARE = 0.2


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
    training, test = (
        ImageSet.named(
            f"digits-{name}-{image_size}", images[indices], labels_N[indices], NUM_CLASSES
        )
        for name, indices in zip(("train", "test"), chosen, strict=True)
    )
    return training, test
