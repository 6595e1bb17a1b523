"""Sample many labelled images batch by batch, and read them back.

Legend: N images, B images per batch, R image side.
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
from dmoe_var.models.collaborative_var import AnyVAR
from dmoe_var.models.dynamic_var import rules_of
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.counts import ExpertCounts, ExpertHistogram
from dmoe_var.moe.observer import Observer, joined
from dmoe_var.moe.selection import Selection, SelectionRule
from dmoe_var.sampling.cuda_graphs import CudaGraphs
from dmoe_var.sampling.sampler import SamplingConfig, config_device, generate

SAMPLES_FILE = "samples.npz"
WORTH_GRAPHS = 4
"""Batches from which on CUDA graphs pay: the first one runs without, the second is recorded."""


@dataclass(frozen=True)
class Samples:
    """Holds images, uint8 (N, R, R, 3), and their labels and seeds, int64 (N,).

    In stored samples, image i was sampled for labels[i] from stream i of seeds[i], so
    `generate(..., labels=[labels[i]], seed=seeds[i], start_index=i)` samples it again.
    """

    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Load stored samples; the images stay on the disk and are read as they are used.

        Raises DataError if the file is missing or broken.
        """
        images = map_npz(path, "arr_0")
        labels, seeds = read_npz(path, ["labels", "seeds"])
        if images.dtype != np.uint8 or images.ndim != 4 or len(labels) != len(images):
            got = f"arr_0 {images.dtype} {images.shape}, labels {labels.shape}"
            raise DataError(f"{path}: expected images uint8 (N, R, R, 3) and N labels; got {got}")
        return cls(images, labels, seeds)


@dataclass(frozen=True)
class Batch:
    """Holds one batch of the images of a `Drawing`."""

    samples: Samples
    ran: ExpertHistogram
    seconds: float
    """How long sampling them took."""


@dataclass(frozen=True)
class Drawing:
    """Says how to sample labelled images: image i for labels[i], from stream i of the seed. So in
    float32 the batch and the process that sample an image change it only by rounding."""

    model: AnyVAR
    vqvae: VQVAE
    labels: np.ndarray
    """int64 (N,)."""
    seed: int
    sampling: SamplingConfig
    selection: Selection = None
    impl: str = "auto"

    @property
    def num_batches(self) -> int:
        return -(-len(self.labels) // self.sampling.batch_size)

    @property
    def image_size(self) -> int:
        """Side R of the images, in pixels."""
        return self.vqvae.config.image_size

    @cached_property
    def _graphs(self) -> CudaGraphs | None:
        graphs = self.sampling.new_graphs(config_device(self.model))
        return graphs if self.num_batches >= WORTH_GRAPHS else None

    @cached_property
    def rules(self) -> dict[int, SelectionRule]:
        """The selection rules, by scale."""
        return rules_of(self.model, selection=self.selection)

    def labels_of(self, number: int) -> np.ndarray:
        """Return the labels (B,) of a batch; batches count from 0."""
        start = number * self.sampling.batch_size
        return self.labels[start : start + self.sampling.batch_size]

    def batch(self, number: int, observer: Observer | None = None) -> Batch:
        """Sample one batch."""
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
            graphs=self._graphs,
        )
        images = to_uint8(drawn)  # copies to the CPU, so a GPU has finished
        seconds = time.perf_counter() - started
        ran = ExpertHistogram.of(counts, self.rules, len(labels))
        seeds = np.full(len(labels), self.seed, dtype=np.int64)
        return Batch(Samples(images, labels, seeds), ran, seconds)


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """Choose the class of each image, int64 (N,): the classes in turn, so that all are as frequent.
    If there are fewer images than classes, the chosen ones lie evenly over all classes."""
    num_samples = values.whole("num_samples", num_samples, 0)
    num_classes = values.whole("num_classes", num_classes, 1)
    turns = np.arange(num_samples, dtype=np.int64)
    if num_samples < num_classes:
        return turns * num_classes // max(num_samples, 1)
    return turns % num_classes
