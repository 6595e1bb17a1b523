"""The state file: whole, and of this configuration, or refused in one line."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoe_var.checkpoints.tensor_files import read_tensors
from dmoe_var.errors import CheckpointError
from dmoe_var.training.state import StateFile


def trained(width=3):
    """A linear model and its optimiser after a step."""
    torch.manual_seed(0)
    module = torch.nn.Linear(2, width)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.fixture
def stored(tmp_path):
    file = StateFile(tmp_path / "state.safetensors", "ours")
    file.save(5, *trained())
    return file


@pytest.mark.parametrize("max_mb", [None, 1])
def test_round_trip(tmp_path, max_mb):
    """Also in pieces, where a moment of the optimiser is cut into two."""
    width = 3 if max_mb is None else 100_000
    stored = StateFile(tmp_path / "state.safetensors", "ours", max_mb)
    stored.save(5, *trained(width))
    sizes = [each.stat().st_size for each in tmp_path.iterdir()]
    assert (len(sizes) == 1) == (max_mb is None)
    assert max(sizes) <= 1_000_000
    module = torch.nn.Linear(2, width)
    optimizer = torch.optim.AdamW(module.parameters())
    assert stored.load(module, optimizer) == 5
    wanted, wanted_optimizer = trained(width)
    torch.testing.assert_close(module.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    ours, theirs = optimizer.state_dict()["state"], wanted_optimizer.state_dict()["state"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["model/weight", "optimizer/bias/step"])
def test_missing_key(stored, key):
    tensors, metadata = read_tensors(stored.path)
    del tensors[key]
    save_file(tensors, stored.path, metadata)
    with pytest.raises(CheckpointError, match=f"{stored.path}: missing 1 keys: {key}"):
        stored.load(*trained())


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def no_longer_a_state(path):
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_short, "missing, cut short"),
        (emptied, "cut short"),
        (no_longer_a_state, "belongs to another configuration"),
    ],
)
def test_broken_file(stored, harm, message):
    harm(stored.path)
    said = f"{stored.path}: {message}.*remove it to start afresh"
    with pytest.raises(CheckpointError, match=said) as caught:
        stored.load(*trained())
    assert "\n" not in str(caught.value)


def test_state_of_another_configuration(stored):
    with pytest.raises(CheckpointError, match=r"another configuration .*ours.*theirs") as caught:
        StateFile(stored.path, "theirs").load(*trained())
    assert "\n" not in str(caught.value)
