"""Measure how often generated digits show the class asked for, by a classifier of real digits.

FID over few images says little about single classes. On digits a support vector machine on 8 x 8
grey pixels is right about 99 times in 100, so the share of samples in which it sees the requested
class is a cheap second measure. Compare it with the share on held-out real digits.

Legend: N images, H W height and width, P the 64 pixels of an 8 x 8 image.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.svm import SVC

from dmoe_var.data.images import check_images
from dmoe_var.errors import InputError

SIDE = 8
"""Side in pixels of the images that the classifier sees, as in scikit-learn's digits."""
WHITE = 16
"""Its brightest grey, as in scikit-learn's digits."""
GAMMA = 0.001
"""Width of the RBF kernel, tuned (by scikit-learn's digits example) for greys from 0 to 16."""

Images: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.integer[Any]]


class LabelAgreement:
    """Compares the labels of images with what a classifier fitted on real images sees."""

    def __init__(self, images: Images, labels: Labels):
        """Fit on real images, uint8 (N, H, W, 3), and their classes, integers (N,)."""
        self._classifier = SVC(gamma=GAMMA).fit(_grey_pixels(images), labels)

    def predict(self, images: Images) -> Labels:
        """Predict the class (N,) of each image, uint8 (N, H, W, 3) of any size from 8 x 8 on."""
        classes_N: Labels = self._classifier.predict(_grey_pixels(images))
        return classes_N

    def accuracy(self, images: Images, labels: Labels) -> float:
        """Return the share in [0, 1] of images, uint8 (N, H, W, 3), that show their label (N,)."""
        return float(np.mean(self.predict(images) == labels))


def _grey_pixels(images: Images) -> npt.NDArray[np.float32]:
    """Reduce images to greys (N, P) in [0, 16]: the channels' mean, area-downsampled to 8 x 8."""
    check_images(images)
    if min(images.shape[1:3]) < SIDE:
        raise InputError(f"images must be at least {SIDE} x {SIDE} pixels; got {images.shape[1:3]}")
    grey_NHW = torch.from_numpy(images.mean(axis=3, dtype=np.float32))
    grey_N1HW = F.interpolate(grey_NHW[:, None], size=(SIDE, SIDE), mode="area")
    pixels_NP: npt.NDArray[np.float32] = (grey_N1HW.flatten(1) * (WHITE / 255)).numpy()
    return pixels_NP
