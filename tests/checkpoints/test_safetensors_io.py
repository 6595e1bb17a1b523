"""Checkpoint folders: bitwise round trips, one clear line for what is wrong, never half a save."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoe_var.checkpoints import safetensors_io
from dmoe_var.checkpoints.safetensors_io import load_checkpoint, save_checkpoint
from dmoe_var.errors import CheckpointError


@pytest.fixture(scope="module")
def models(make_vqvae, make_var, make_moe):
    var = make_var()
    return {
        "vqvae": make_vqvae(num_phi=2),
        "var": var,
        "shared": make_var(shared_adaln=True, attn_l2_norm=False, activation="relu"),
        "moe": make_moe(var),
    }


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    """A whole checkpoint; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    save_checkpoint(folder, models["var"])
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoint")


def assert_refused(folder, *said, kind="var"):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, kind)
    message = str(caught.value)
    assert "\n" not in message
    assert all(text in message for text in (str(folder), *said)), message


@pytest.mark.parametrize(
    ("name", "kind"), [("vqvae", "vqvae"), ("var", "var"), ("shared", "var"), ("moe", "var")]
)
def test_round_trip_is_bitwise(models, tmp_path, name, kind):
    model = models[name]
    save_checkpoint(tmp_path / "new" / name, model)
    loaded = load_checkpoint(tmp_path / "new" / name, kind)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    assert same(loaded, model)


def test_what_is_in_the_folder(folder):
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    content = json.loads((folder / "config.json").read_text())
    assert (content["format"], content["kind"]) == ("dmoe-var/1", "var")
    assert os.listdir(folder.parent) == ["checkpoint"]


# Damage


@pytest.mark.parametrize("left", [0, 4, 100, 5000, -1])
def test_truncated_tensors(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert_refused(folder, "model.safetensors", "cut short")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("head.bias"), ("missing", "head.bias")),
        (lambda t: t.update(extra=torch.zeros(1)), ("unexpected", "extra")),
        (lambda t: t.update({"head.bias": torch.zeros(3)}), ("head.bias", "(3,)", "(32,)")),
    ],
    ids=["missing key", "extra key", "wrong shape"],
)
def test_tensors_that_do_not_fit(folder, change, said):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert_refused(folder, "model.safetensors", *said)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    assert_refused(folder, name, "no such")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON"),
        (b'{"format": "dmoe-var/1", "kind"', "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[]", "kind=None"),
        (b"3", "kind=None"),
        (b'{"format": "dmoe-var/1", "kind": "vqvae", "config": {}}', "kind='vqvae'"),
        (b'{"format": "dmoe-var/9", "kind": "var", "config": {}}', "dmoe-var/1"),
        (b'{"format": "dmoe-var/1", "kind": "var"}', "config"),
        (b'{"format": "dmoe-var/1", "kind": "var", "config": {"depth": -1}}', "config.depth"),
        (b'{"format": "dmoe-var/1", "kind": "var", "config": {"deep": 2}}', "config.deep"),
        (b'{"format": "dmoe-var/1", "kind": "var", "config": {"num_heads": 3}}', "num_heads=3"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_wrong_configurations(folder, content, said):
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, "config.json", said)


def test_another_kind(folder):
    assert_refused(folder, "kind='var'", kind="vqvae")


def test_another_configuration_lists_what_does_not_fit(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["config"]["depth"] = 3
    path.write_text(json.dumps(content))
    assert_refused(folder, "blocks.2.ffn.fc1.weight")


# Interruption


def test_a_later_save_replaces(folder, models):
    save_checkpoint(folder, models["moe"])
    assert same(load_checkpoint(folder, "var"), models["moe"])
    assert os.listdir(folder.parent) == ["checkpoint"]


def half_a_file(tensors, path, metadata):
    path.write_bytes(b"half")
    raise OSError("disk full")


@pytest.mark.parametrize("also_new", [False, True])
def test_a_save_that_fails_leaves_the_old_one(folder, models, monkeypatch, also_new):
    if also_new:
        shutil.rmtree(folder)
    monkeypatch.setattr(safetensors_io, "save_file", half_a_file)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(folder, models["moe"])
    if also_new:
        assert not folder.exists()
    else:
        assert same(load_checkpoint(folder, "var"), models["var"])
    monkeypatch.undo()
    save_checkpoint(folder, models["moe"])
    assert same(load_checkpoint(folder, "var"), models["moe"])
    assert os.listdir(folder.parent) == ["checkpoint"]


def test_a_kill_between_the_renames_leaves_a_checkpoint(folder, models, monkeypatch):
    """Whatever the order of steps: after the last rename fails, the old or the new one loads."""
    rename = os.replace

    def killed(source, target):
        if target == folder:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(safetensors_io.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, models["moe"])
    monkeypatch.undo()
    loaded = load_checkpoint(folder, "var")
    assert same(loaded, models["var"]) or same(loaded, models["moe"])
