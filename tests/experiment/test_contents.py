"""What stages are given, by content."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from dmoe_var.data.config import DataConfig
from dmoe_var.errors import InputError
from dmoe_var.experiment.contents import DataSet, content, held


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


def test_pictures_that_are_there_and_broken_are_refused(tmp_path):
    """Or a record of what they were would be taken for one of them; those that are missing are not
    at hand."""
    pictures = DataConfig(kind="image_folder", root=str(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    assert content(DataSet(pictures, 10, held_out=True), tmp_path) is None  # nothing is mounted
    (tmp_path / "there" / "train").touch()
    with pytest.raises(InputError, match=str(tmp_path)):
        content(DataSet(pictures, 10, held_out=True), tmp_path)
    gone = DataSet(replace(pictures, root=str(tmp_path / "gone")), 10, held_out=True)
    assert content(gone, tmp_path) is None


def test_another_thread_holds_nothing(tmp_path):
    """Or it would see the contents of then."""
    path = written(tmp_path / "images.npz", 0)
    with held(), ThreadPoolExecutor(1) as pool:
        first = content(path, tmp_path)
        written(path, 1)
        assert pool.submit(content, path, tmp_path).result() != first
