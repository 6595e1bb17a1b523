"""Many labelled images: how they are drawn batch by batch, and how they are read back.

Legend: N images, B images of a batch, R image side.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dmoe_var import values
from dmoe_var.arrays import map_npz, read_npz
from dmoe_var.data.images import to_uint8
from dmoe_var.errors import DataError
from dmoe_var.models.dynamic_var import DynamicVAR, rules_of
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.counts import ExpertCounts, ExpertHistogram
from dmoe_var.moe.observer import Observer, joined
from dmoe_var.moe.selection import Selection, SelectionRule
from dmoe_var.sampling.sampler import SamplingConfig, generate

SAMPLES_FILE = "samples.npz"


@dataclass(frozen=True)
class Samples:
    """images: uint8 (N, R, R, 3); labels, seeds: int64 (N,).

    Of stored samples image i was drawn for labels[i] from stream i of seeds[i]:
    `generate(..., labels=[labels[i]], seed=seeds[i], start_index=i)` draws it again.
    """

    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Stored samples; the images stay on the disk, and are read as they are used.

        Raises DataError where the file is missing or broken.
        """
        images = map_npz(path, "arr_0")
        labels, seeds = read_npz(path, ["labels", "seeds"])
        if images.dtype != np.uint8 or images.ndim != 4 or len(labels) != len(images):
            got = f"arr_0 {images.dtype} {images.shape}, labels {labels.shape}"
            raise DataError(f"{path}: expected images uint8 (N, R, R, 3) and N labels; got {got}")
        return cls(images, labels, seeds)


@dataclass(frozen=True)
class Batch:
    """Some of the images of a drawing."""

    samples: Samples
    ran: ExpertHistogram
    seconds: float
    """What drawing them took."""


@dataclass(frozen=True)
class Drawing:
    """How a set of labelled images is drawn: image i for labels[i] from stream i of the seed, so
    that in float32 neither the batch nor the process that draws it moves it but by rounding."""

    model: VAR | DynamicVAR
    vqvae: VQVAE
    labels: np.ndarray
    """int64 (N,)."""
    seed: int
    sampling: SamplingConfig
    selection: Selection = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        labels = np.array(values.whole_numbers("labels", self.labels), dtype=np.int64)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "seed", values.whole("seed", self.seed))

    @property
    def num_batches(self) -> int:
        return -(-len(self.labels) // self.sampling.batch_size)

    @property
    def image_size(self) -> int:
        """R."""
        return self.vqvae.config.image_size

    @cached_property
    def rules(self) -> dict[int, SelectionRule]:
        """The selection rule of each scale that has one."""
        return rules_of(self.model, selection=self.selection)

    def labels_of(self, number: int) -> np.ndarray:
        """Labels (B,) of a batch, counted from 0."""
        start = number * self.sampling.batch_size
        return self.labels[start : start + self.sampling.batch_size]

    def batch(self, number: int, observer: Observer | None = None) -> Batch:
        """Draw one batch."""
        sampling, counts, labels = self.sampling, ExpertCounts(), self.labels_of(number)
        started = time.perf_counter()
        drawn = generate(
            self.model,
            self.vqvae,
            torch.from_numpy(labels),
            **sampling.options,
            seed=self.seed,
            selection=self.selection,
            start_index=number * sampling.batch_size,
            impl=self.impl,
            observer=joined(counts, observer),
        )
        images = to_uint8(drawn)  # on the CPU: what a GPU was given to do is done
        seconds = time.perf_counter() - started
        ran = ExpertHistogram.of(counts, self.rules, len(labels))
        seeds = np.full(len(labels), self.seed, dtype=np.int64)
        return Batch(Samples(images, labels, seeds), ran, seconds)


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """Class of each image, int64 (N,): the classes in turn, so that all are as frequent; of more
    classes than images, some that lie evenly over all."""
    num_samples = values.whole("num_samples", num_samples, 0)
    num_classes = values.whole("num_classes", num_classes, 1)
    turns = np.arange(num_samples, dtype=np.int64)
    if num_samples < num_classes:
        return turns * num_classes // max(num_samples, 1)
    return turns % num_classes
