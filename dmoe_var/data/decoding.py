"""Decode blocks of images in threads, while the encoder is at work.

Threads, not processes: Pillow lets other threads run while it decodes and resizes (nine tenths of
the time of a 256-pixel picture). Between processes, batches would pass through shared memory.
Containers often have little of it, and a full one stops them for ever.

Legend: B batch, R image side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe_var.data.images import Decoded, Images, Unreadable

AHEAD = 2
"""Batches that each thread decodes ahead of the encoder."""


@dataclass(frozen=True)
class DecodedBatch:
    """A decoded batch, how long its decoder was busy, and how long it was waited for."""

    pixels_BRR3: Tensor
    unreadable: list[Unreadable]
    busy_s: float
    wait_s: float


def decoded(
    images: Images, blocks: Sequence[range], batch_size: int, workers: int
) -> Iterator[tuple[range, bool, DecodedBatch]]:
    """Yield the images of blocks in order, batch by batch, with True for the last of each block.

    A batch never spans two blocks, so that a block does not depend on where a run began. Without
    workers a batch is decoded when it is asked for.
    """
    batches = [
        (block, block[start : start + batch_size])
        for block in blocks
        for start in range(0, len(block), batch_size)
    ]
    waiting = time.perf_counter()
    results = _in_order(images, [indices for _, indices in batches], workers)
    for (block, indices), (found, busy_s) in zip(batches, results, strict=True):
        wait_s = time.perf_counter() - waiting
        pixels_BRR3 = torch.from_numpy(found.pixels_BRR3)
        batch = DecodedBatch(pixels_BRR3, found.unreadable, busy_s, wait_s)
        yield block, indices.stop == block.stop, batch
        waiting = time.perf_counter()


def _in_order(
    images: Images, batches: Sequence[range], workers: int
) -> Iterator[tuple[Decoded, float]]:
    """Yield each batch with the seconds that it took."""

    def decode(indices: range) -> tuple[Decoded, float]:
        started = time.perf_counter()
        found = images.decode(indices)
        return found, time.perf_counter() - started

    if workers == 0:
        yield from map(decode, batches)
        return
    pool = ThreadPoolExecutor(workers)
    under_way: deque[Future[tuple[Decoded, float]]] = deque()
    try:
        for indices in batches:
            under_way.append(pool.submit(decode, indices))
            if len(under_way) > AHEAD * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
