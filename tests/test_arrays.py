"""Arrays that are larger than memory: written in pieces, mapped, and whole or not at all."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dmoe_var.arrays import StoredRows, is_intact, map_npz, names_in, read_npz, write_npz
from dmoe_var.errors import DataError

ARRAYS = {
    "a": np.arange(24, dtype=np.uint8).reshape(4, 2, 3),
    "b": np.linspace(0, 1, 5),
    "text": np.array("words"),
}


def test_numpy_reads_what_was_written(tmp_path):
    write_npz(tmp_path / "new" / "file.npz", ARRAYS)
    with np.load(tmp_path / "new" / "file.npz", allow_pickle=False) as file:
        assert sorted(file) == sorted(ARRAYS)
        assert all(np.array_equal(file[name], array) for name, array in ARRAYS.items())
    assert names_in(tmp_path / "new" / "file.npz") == list(ARRAYS)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.npz"]


def test_pieces_and_time_do_not_change_the_bytes(tmp_path, monkeypatch):
    write_npz(tmp_path / "whole.npz", ARRAYS)
    in_columns = np.asfortranarray(ARRAYS["a"])
    rows = StoredRows((4, 2, 3), np.uint8, [in_columns[:1], in_columns[1:3], in_columns[3:]])
    later = time.time() + 10_000
    monkeypatch.setattr(time, "time", lambda: later)
    write_npz(tmp_path / "pieces.npz", {**ARRAYS, "a": rows})
    assert (tmp_path / "pieces.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize(
    "pieces",
    [
        [ARRAYS["a"][:3]],
        [ARRAYS["a"][:, :1]],
        [ARRAYS["a"].astype(np.int8)],
    ],
)
def test_other_pieces_leave_nothing(tmp_path, pieces):
    with pytest.raises(ValueError, match="a: "):
        write_npz(tmp_path / "file.npz", {"a": StoredRows((4, 2, 3), np.uint8, pieces)})
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_the_old_file(tmp_path):
    def interrupted():
        yield ARRAYS["a"][:2]
        raise KeyboardInterrupt

    write_npz(tmp_path / "file.npz", {"a": ARRAYS["b"]})
    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "file.npz", {"a": StoredRows((4, 2, 3), np.uint8, interrupted())})
    assert [path.name for path in tmp_path.iterdir()] == ["file.npz"]
    assert np.array_equal(read_npz(tmp_path / "file.npz", ["a"])[0], ARRAYS["b"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, None])
def test_mapped_arrays_are_those_of_the_file(tmp_path, save):
    """Ours and numpy's are mapped; compressed ones are loaded."""
    path = tmp_path / "file.npz"
    arrays = {**ARRAYS, "fortran": np.asfortranarray(ARRAYS["a"]), "none": np.zeros((0, 3))}
    write_npz(path, arrays) if save is None else save(path, **arrays)
    for name, array in arrays.items():
        mapped = map_npz(path, name)
        assert np.array_equal(mapped, array)
        assert mapped.dtype == array.dtype
        on_disk = save is not np.savez_compressed and array.size > 0
        assert isinstance(mapped, np.memmap) == on_disk
    assert is_intact(path)


@pytest.mark.parametrize("left", [None, 0, 200, -1], ids=str)
def test_files_cut_short_are_one_line(tmp_path, left):
    path = tmp_path / "file.npz"
    if left is not None:
        write_npz(path, ARRAYS)
        path.write_bytes(path.read_bytes()[:left])
    for call in (
        lambda: read_npz(path, ["a"]),
        lambda: map_npz(path, "a"),
        lambda: names_in(path),
    ):
        with pytest.raises(DataError, match=str(path)) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not is_intact(path)


def test_too_little_memory_is_no_broken_file(tmp_path, monkeypatch):
    def too_large(*_, **__):
        raise MemoryError

    monkeypatch.setattr(np, "load", too_large)
    with pytest.raises(MemoryError):
        read_npz(tmp_path / "file.npz", ["a"])


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "file.npz"
    write_npz(path, ARRAYS)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(range(20)))] ^= 1
    path.write_bytes(content)
    assert not is_intact(path)
    with pytest.raises(DataError, match=str(path)):
        read_npz(path, ["a"])


@pytest.mark.parametrize("read", [map_npz, lambda path, name: read_npz(path, [name])])
def test_missing_arrays_and_python_objects_are_refused(tmp_path, read):
    path = tmp_path / "file.npz"
    np.savez(path, objects=np.array([{}], dtype=object))
    for name in ("objects", "mu"):
        with pytest.raises(DataError, match=str(path)):
            read(path, name)
