"""Decoding beside the encoder: in order, and not too far ahead."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dmoe_var.data.decoding import AHEAD, decoded
from dmoe_var.data.images import Decoded

BLOCKS = [range(10), range(10, 17)]


class Numbers:
    """Images that are their own indices; later batches are decoded sooner."""

    def __init__(self, fails_at=None):
        self.fails_at, self.started = fails_at, 0

    def decode(self, indices):
        self.started += 1
        if self.fails_at in indices:
            raise MemoryError
        time.sleep(0.002 * (20 - indices[0]) / 20)
        return Decoded(np.array(indices, np.uint8).reshape(-1, 1, 1, 1), [])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order(workers):
    found = list(decoded(Numbers(), BLOCKS, 4, workers))
    batches = [batch.pixels_BRR3.flatten().tolist() for _, _, batch in found]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15, 16]]
    first, second = BLOCKS
    assert [(block, last) for block, last, _ in found] == [
        (first, False), (first, False), (first, True), (second, False), (second, True),
    ]  # fmt: skip
    assert all(batch.busy_s > 0 for _, _, batch in found)


def test_decoders_do_not_run_far_ahead():
    images = Numbers()
    batches = decoded(images, BLOCKS, 1, 2)
    next(batches)
    time.sleep(0.1)
    assert images.started <= AHEAD * 2 + 1
    batches.close()
    assert images.started <= AHEAD * 2 + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_decoder_ends_the_run(workers):
    with pytest.raises(MemoryError):
        list(decoded(Numbers(fails_at=5), BLOCKS, 2, workers))
