"""Measure how often generated images show the class asked for, by a classifier of real ones.

FID over few images says little about single classes, so the share of samples in which a classifier
sees the requested class is a second measure. Compare it with the share on held-out real images. On
digits a support vector machine on 8 x 8 grey pixels is right about 99 times in 100; photographs
take a network.

Legend: B batch, N images, H W height and width, P the 64 pixels of an 8 x 8 image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.svm import SVC

from dmoe_var.data.image_sets import Pixels, all_pixels, as_pixels
from dmoe_var.data.images import Images, check_images, scaled
from dmoe_var.errors import InputError
from dmoe_var.models.classifier import ResNetClassifier

SIDE = 8
"""Side in pixels of the images that the classifier sees, as in scikit-learn's digits."""
WHITE = 16
"""Its brightest grey, as in scikit-learn's digits."""
GAMMA = 0.001
"""Width of the RBF kernel, tuned (by scikit-learn's digits example) for greys from 0 to 16."""

Array: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.integer[Any]]


class Classifier(ABC):
    """Compares the labels of images with the classes that it sees in them."""

    @abstractmethod
    def predict(self, images: Pixels | Array) -> Labels:
        """Predict the class (N,) of each image, uint8 (N, H, W, 3)."""

    def accuracy(self, images: Pixels | Array, labels: Labels) -> float:
        """Return the share in [0, 1] of images, uint8 (N, H, W, 3), that show their label (N,)."""
        return float(np.mean(self.predict(images) == labels))

    @property
    def about(self) -> dict[str, Any]:
        """Tell a record which classifier it is, unless that is plain from the data."""
        return {}


class LabelAgreement(Classifier):
    """A support vector machine, fitted on real images when it is made."""

    def __init__(self, images: Array, labels: Labels):
        """Fit on real images, uint8 (N, H, W, 3), and their classes, integers (N,)."""
        self._classifier = SVC(gamma=GAMMA).fit(_grey_pixels(images), labels)

    def predict(self, images: Pixels | Array) -> Labels:
        """Predict the class (N,) of each image, uint8 (N, H, W, 3) of any size from 8 x 8 on."""
        classes_N: Labels = self._classifier.predict(_grey_pixels(all_pixels(as_pixels(images))))
        return classes_N


class NetworkAgreement(Classifier):
    """A trained network, of which a record tells how often it is right on held-out images."""

    def __init__(self, network: ResNetClassifier, held_out: Images, batch_size: int):
        self._network = network.eval()
        self._batch_size = batch_size
        self.held_out_accuracy = self.accuracy(held_out, held_out.labels)

    @torch.inference_mode()
    def predict(self, images: Pixels | Array) -> Labels:
        """Predict the class (N,) of each image, uint8 (N, H, W, 3), batch by batch."""
        images, device = as_pixels(images), self._network.head.weight.device
        classes = [
            self._network(scaled(torch.from_numpy(images.pixels(indices_B)).to(device))).argmax(1)
            for indices_B in torch.arange(len(images)).split(self._batch_size)
        ]
        classes_N: Labels = torch.cat(classes).cpu().numpy()
        return classes_N

    @property
    def about(self) -> dict[str, Any]:
        return {"classifier": "resnet", "classifier_held_out_accuracy": self.held_out_accuracy}


def _grey_pixels(images: Array) -> npt.NDArray[np.float32]:
    """Reduce images to greys (N, P) in [0, 16]: the channels' mean, area-downsampled to 8 x 8."""
    check_images(images)
    if min(images.shape[1:3]) < SIDE:
        raise InputError(f"images must be at least {SIDE} x {SIDE} pixels; got {images.shape[1:3]}")
    grey_NHW = torch.from_numpy(images.mean(axis=3, dtype=np.float32))
    grey_N1HW = F.interpolate(grey_NHW[:, None], size=(SIDE, SIDE), mode="area")
    pixels_NP: npt.NDArray[np.float32] = (grey_N1HW.flatten(1) * (WHITE / 255)).numpy()
    return pixels_NP
