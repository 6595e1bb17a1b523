"""What stages are given, by content."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np

from dmoe_var.experiment.contents import content, held


def written(path, value):
    np.savez(path, arr_0=np.full((2, 4, 4, 3), value, dtype=np.uint8))
    return path


def test_held_content_is_looked_at_once(tmp_path):
    path = written(tmp_path / "images.npz", 0)
    with held():
        first = content(path, tmp_path)
        written(path, 1)
        with held():
            assert content(path, tmp_path) == first
        assert content(path, tmp_path) == first
    assert content(path, tmp_path) != first


def test_threads_that_end_in_the_order_they_began_leave_nothing_held(tmp_path):
    """Or all that follows in the process would see the contents of then."""
    path = written(tmp_path / "images.npz", 0)
    both_within, first_is_out = Barrier(2), Event()

    def first():
        with held():
            content(path, tmp_path)
            both_within.wait()
        first_is_out.set()

    def second():
        with held():
            found = content(path, tmp_path)
            both_within.wait()
            first_is_out.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        ended = pool.submit(first)
        before = pool.submit(second).result()
        ended.result()
    written(path, 1)
    after = content(path, tmp_path)
    written(path, 2)
    assert content(path, tmp_path) != after != before
