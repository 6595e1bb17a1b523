"""Tensors in files of a limited size: bitwise what was written, or one clear line."""

from __future__ import annotations

import json

import pytest
import torch
from checking import assert_refused
from safetensors.torch import save_file

from dmoe_var.checkpoints import tensor_files
from dmoe_var.checkpoints.safetensors_io import load_checkpoint, read_fingerprint, save_checkpoint
from dmoe_var.checkpoints.tensor_files import (
    MB,
    PIECES,
    read_metadata,
    read_tensors,
    remove_tensors,
    write_tensors,
)
from dmoe_var.errors import CheckpointError
from dmoe_var.files import sha256_of

ABOUT = {"state": "5"}


def tensors(seed=0):
    """Five that a file of a megabyte holds one of, one that takes three files, and small ones."""
    draw = torch.Generator().manual_seed(seed)
    found = {f"layer{i}": torch.randn(300, 500, generator=draw) for i in range(5)}
    found["wide"] = torch.randn(2, 250_000, generator=draw)
    found["half"] = torch.randn(7, 9, generator=draw).bfloat16()
    return found | {"step": torch.tensor(3), "none": torch.empty(0, 4), "seen": torch.ones(3) > 0}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "state.safetensors"
    write_tensors(path, tensors(), ABOUT, max_mb=1)
    return path


def pieces(path):
    return sorted(path.parent.glob(f"{path.name}.*"))


def test_small_files_hold_what_was_written(file):
    found, about = read_tensors(file)
    assert same(found, tensors())
    assert about == read_metadata(file) == ABOUT
    sizes = [each.stat().st_size for each in (file, *pieces(file))]
    assert max(sizes) <= MB
    assert len(sizes) == 5 + 3
    assert {each.stat().st_mode for each in pieces(file)} == {file.stat().st_mode}


@pytest.mark.parametrize("max_mb", [None, 50])
def test_what_fits_is_one_plain_file(tmp_path, max_mb):
    """To the byte what it is without a limit."""
    save_file(tensors(), tmp_path / "plain", ABOUT)
    write_tensors(tmp_path / "file", tensors(), ABOUT, max_mb)
    assert (tmp_path / "file").read_bytes() == (tmp_path / "plain").read_bytes()
    assert not pieces(tmp_path / "file")


def test_its_hash_is_of_all_pieces(file):
    before = sha256_of(file)
    write_tensors(file, tensors() | {"step": torch.tensor(4)}, ABOUT, max_mb=1)
    assert sha256_of(file) != before
    write_tensors(file, tensors(), ABOUT, max_mb=1)
    assert sha256_of(file) == before


@pytest.mark.parametrize("max_mb", [None, 1, 2])
def test_older_pieces_go(file, max_mb):
    """Whatever limit is next; another file's, of a longer name, stay."""
    other = file.with_name(f"{file.name}x")
    write_tensors(other, tensors(2), ABOUT, max_mb=1)
    write_tensors(file, tensors(1), ABOUT, max_mb)
    assert same(read_tensors(file)[0], tensors(1))
    assert len(pieces(file)) == {None: 0, 1: 7, 2: 3}[max_mb]
    assert same(read_tensors(other)[0], tensors(2))
    remove_tensors(file)
    assert not file.exists()
    assert not pieces(file)
    assert same(read_tensors(other)[0], tensors(2))
    remove_tensors(file)


def test_a_kill_leaves_the_old_tensors(file, monkeypatch):
    """Before the file gets its name, and after a full disk; new pieces do not stay. Those of a kill
    that lets nothing tidy up go before the next ones are written."""

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            write_tensors(file, tensors(1), ABOUT, max_mb=1)
    assert len(pieces(file)) == 7
    assert same(read_tensors(file)[0], tensors())
    left = file.with_name(f"{file.name}.{'0' * 16}")
    left.touch()
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save", lambda pack: killed() if not left.exists() else b"")
        with pytest.raises(KeyboardInterrupt):
            write_tensors(file, tensors(1), ABOUT, max_mb=1)
    assert same(read_tensors(file)[0], tensors())
    write_tensors(file, tensors(1), ABOUT, max_mb=1)
    assert same(read_tensors(file)[0], tensors(1))
    assert len(pieces(file)) == 7


def test_an_interrupt_once_the_new_file_is_there(file, monkeypatch):
    """Its pieces stay, and the old ones go."""
    write = tensor_files._write

    def interrupted(*given):
        write(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_files, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(file, tensors(1), ABOUT, max_mb=1)
    assert same(read_tensors(file)[0], tensors(1))
    assert len(pieces(file)) == 7


def test_names_and_metadata_count(tmp_path):
    """Thousands of small tensors, whose names take more than their values."""
    many = {f"model/blocks.{i}.some.long.name.of.a.weight": torch.ones(2) for i in range(9000)}
    about = {"state": json.dumps({"keys": sorted(many)[:2000]})}
    path = tmp_path / "state"
    write_tensors(path, many, about, max_mb=1)
    found, told = read_tensors(path)
    assert same(found, many)
    assert told == about
    sizes = [each.stat().st_size for each in tmp_path.iterdir()]
    assert max(sizes) <= MB
    assert len(sizes) > 1


def changed(piece):
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda piece: piece.unlink(), "cannot be read"),
        (lambda piece: piece.write_bytes(piece.read_bytes()[:-1]), "is not the piece"),
        (changed, "is not the piece that belongs to state.safetensors"),
    ],
)
def test_a_piece_that_is_not_its_own(file, harm, message):
    piece = pieces(file)[2]
    harm(piece)
    for read in (read_tensors, read_metadata):
        with pytest.raises(CheckpointError, match=message) as refused:
            read(file)
        assert str(refused.value).startswith(str(piece))


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        "{}",
        json.dumps({"sha256": 3, "cut": {}, "metadata": {}}),
        json.dumps({"sha256": [], "cut": [], "metadata": []}),
        json.dumps({"sha256": [], "cut": {"a": [2]}, "metadata": {}}),
        json.dumps({"sha256": [], "cut": {"b": [3]}, "metadata": {}}),
        json.dumps({"sha256": [], "cut": {"b": "x"}, "metadata": {}}),
        json.dumps({"sha256": ["../../etc"], "cut": {}, "metadata": {}}),
    ],
)
def test_hostile_metadata(tmp_path, content):
    path = tmp_path / "model.safetensors"
    save_file({"b#0": torch.ones(2)}, path, {PIECES: content})
    assert_refused(lambda path, kind: read_tensors(path), path, str(path), kind="")


def test_a_checkpoint_in_pieces(tmp_path, make_var):
    """Its folder and its file load as one of another limit does; a smaller one leaves no piece."""
    var, folder = make_var(width=192), tmp_path / "checkpoint"
    save_checkpoint(folder, var, "ours", max_mb=1)
    weights = folder / "model.safetensors"
    assert len(pieces(weights)) > 2
    assert max(each.stat().st_size for each in folder.iterdir()) <= MB
    for source in (folder, weights):
        assert same(load_checkpoint(source, "var").state_dict(), var.state_dict())
    assert read_fingerprint(folder) == "ours"
    save_checkpoint(folder, make_var(), "theirs", max_mb=1)
    assert same(load_checkpoint(folder, "var").state_dict(), make_var().state_dict())
    assert len(pieces(weights)) < 2
