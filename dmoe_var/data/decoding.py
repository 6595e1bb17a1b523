"""Decodes the images of shards in worker processes, while the encoder is at work.

Legend: B batch, R image side.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmoe_var.data.images import Images, Unreadable
from dmoe_var.data.token_shards import Shard


@dataclass(frozen=True)
class Batch:
    """A decoded batch, how long its decoder was busy, and how long it was waited for."""

    pixels_BRR3: Tensor
    unreadable: list[Unreadable]
    busy_s: float
    wait_s: float


class _Batches(Dataset[tuple[np.ndarray, list[Unreadable], float]]):
    """Decodes a batch a call, in the worker process that asks for it."""

    def __init__(self, images: Images, batches: Sequence[range]):
        self.images = images
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[np.ndarray, list[Unreadable], float]:
        started = time.perf_counter()
        pixels_BRR3, unreadable = self.images.decode(self.batches[number])
        return pixels_BRR3, unreadable, time.perf_counter() - started


def decoded(
    images: Images, shards: Sequence[Shard], batch_size: int, workers: int
) -> Iterator[tuple[Shard, bool, Batch]]:
    """The images of shards in order, a batch at a time; True with the last of each shard.

    A batch never spans two shards, so that a shard does not depend on where a run began.
    """
    batches = [
        (shard, range(start, min(start + batch_size, shard.last)))
        for shard in shards
        for start in range(shard.first, shard.last, batch_size)
    ]
    if not batches:
        return
    loader = DataLoader(
        _Batches(images, [indices for _, indices in batches]),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # it draws seeds: not from the generator of training
    )
    waiting = time.perf_counter()
    for (shard, indices), (pixels_BRR3, unreadable, busy_s) in zip(batches, loader, strict=True):
        wait_s = time.perf_counter() - waiting
        batch = Batch(pixels_BRR3, unreadable, busy_s, wait_s)
        yield shard, indices.stop == shard.last, batch
        waiting = time.perf_counter()
