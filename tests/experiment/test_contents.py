"""What stages are given, by content."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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


def test_another_thread_holds_nothing(tmp_path):
    """Or it would see the contents of then."""
    path = written(tmp_path / "images.npz", 0)
    with held(), ThreadPoolExecutor(1) as pool:
        first = content(path, tmp_path)
        written(path, 1)
        assert pool.submit(content, path, tmp_path).result() != first
