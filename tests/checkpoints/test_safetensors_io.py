"""Checkpoint folders: bitwise round trips, one clear line for what is wrong, never half a save."""

from __future__ import annotations

import json
import os
import platform
import shutil

import checking
import pytest
import torch
from checking import same

from dmoe_var.checkpoints import safetensors_io, tensor_files
from dmoe_var.checkpoints.safetensors_io import (
    MODEL_FILE,
    load_checkpoint,
    read_fingerprint,
    save_checkpoint,
    whole_folder,
)
from dmoe_var.checkpoints.tensor_files import read_tensors, write_tensors
from dmoe_var.errors import CheckpointError
from dmoe_var.training.state import StateFile


@pytest.fixture(scope="module")
def models(make_vqvae, make_var, make_moe):
    var = make_var()
    return {
        "vqvae": make_vqvae(num_phi=2),
        "var": var,
        "shared": make_var(shared_adaln=True, attn_l2_norm=False, activation="relu"),
        "moe": make_moe(var),
    }


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
    checking.assert_refused(load_checkpoint, folder, *said, kind=kind)


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


@pytest.mark.parametrize("left", [0, 100, -1])
def test_truncated_tensors(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert_refused(folder, "model.safetensors", "cut short")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    assert_refused(folder, name, "o such")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON"),
        (b'{"format": "dmoe-var/1", "kind"', "no JSON"),
        (b"[]", "kind=None"),
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


def test_another_configuration_says_what_does_not_fit(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["config"]["depth"] = 3
    path.write_text(json.dumps(content))
    assert_refused(folder, "depth is 2, its config.json says 3")
    assert_refused(folder, "kind='var'", kind="vqvae")


# Interruption


@pytest.mark.parametrize(
    ("max_mb", "number"), [(None, 0), (None, 1), (1, 0), (1, 1), (1, 3), (1, 6)]
)
def test_a_kill_while_files_are_put_in_place(folder, models, monkeypatch, max_mb, number):
    """The newer weights never load with the older configuration, in pieces neither."""
    rename, renamed = os.replace, []
    monkeypatch.setattr(tensor_files, "MB", 100_000)
    save_checkpoint(folder, models["var"], max_mb=max_mb)

    def killed(source, target):
        if target.parent == folder:
            renamed.append(target)
            if len(renamed) > number:
                raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(safetensors_io.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, models["moe"], max_mb=max_mb)
    monkeypatch.undo()
    assert_refused(folder, "config.json: cannot be read (No such file")
    save_checkpoint(folder, models["moe"])
    assert same(load_checkpoint(folder, "var"), models["moe"])
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_two_writers(folder, models):
    """Neither takes the other's files away; what a killed one left is removed."""
    killed = folder.with_name(f".checkpoint.{platform.node()}-{2**31 - 1}.0.tmp")
    (killed / "deep").mkdir(parents=True)
    with whole_folder(folder) as temporary:
        (temporary / "first").touch()
        save_checkpoint(folder, models["moe"])
        assert (temporary / "first").exists()
    assert os.listdir(folder.parent) == ["checkpoint"]


def test_a_link_to_a_folder_elsewhere(folder, models, tmp_path):
    """As where checkpoints lie on a larger disk: it can be saved over, again and again."""
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    for name in ("moe", "var"):
        save_checkpoint(link, models[name])
        assert same(load_checkpoint(link, "var"), models[name])


def test_the_fingerprint_is_that_of_the_save(folder, models):
    assert read_fingerprint(folder) == ""
    save_checkpoint(folder, models["var"], "one")
    save_checkpoint(folder, models["var"], "another")
    assert read_fingerprint(folder) == "another"
    path = folder / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        read_fingerprint(folder)


# Disks


def assert_one_line(error, *said):
    message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    assert "\n" not in message
    assert all(text in message for text in (*said, "too large")), message


@pytest.mark.parametrize("room", [0, 500, 500_000])
@pytest.mark.parametrize("old", [True, False])
def test_a_checkpoint_on_a_full_disk(folder, models, full_disk, room, old):
    """room: bytes of a file that fit. The tiny VAR takes 560 kB, its configuration 600 bytes."""
    if not old:
        shutil.rmtree(folder)
    with full_disk(room), pytest.raises((CheckpointError, OSError)) as caught:
        save_checkpoint(folder, models["moe"])
    assert_one_line(caught.value, str(folder.parent), MODEL_FILE)
    assert os.listdir(folder.parent) == (["checkpoint"] if old else [])
    if old:
        assert same(load_checkpoint(folder, "var"), models["var"])


def test_tensors_on_a_full_disk(tmp_path, models, full_disk):
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {})
    with full_disk(5_000), pytest.raises((CheckpointError, OSError)) as caught:
        write_tensors(path, models["var"].state_dict(), {})
    assert_one_line(caught.value, str(path))
    assert read_tensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["tensors.safetensors"]


def test_a_training_state_on_a_full_disk(tmp_path, full_disk):
    """Training can go on from the state before."""
    module = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(64)).sum().backward()
    optimizer.step()
    state = StateFile(tmp_path / "state.safetensors", "fingerprint")
    state.save(3, module, optimizer)
    before = module.weight.detach().clone()
    optimizer.step()
    for room in (0, 20_000):
        with full_disk(room), pytest.raises((CheckpointError, OSError)) as caught:
            state.save(4, module, optimizer)
        assert_one_line(caught.value, str(state.path))
        assert os.listdir(tmp_path) == ["state.safetensors"]
    assert state.load(module, optimizer) == 3
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("name", ["file", "folder/deep/checkpoint"])
def test_where_there_is_a_file_or_nothing_yet(tmp_path, models, name):
    """Missing folders are made; a file in the way is not lost without a word."""
    if name == "file":
        (tmp_path / name).write_text("mine")
        with pytest.raises((CheckpointError, OSError), match="file"):
            save_checkpoint(tmp_path / name, models["var"])
        assert (tmp_path / name).read_text() == "mine"
        assert os.listdir(tmp_path) == ["file"]
    else:
        save_checkpoint(tmp_path / name, models["var"])
        assert same(load_checkpoint(tmp_path / name, "var"), models["var"])


def test_others_may_read_what_this_user_may(folder, models):
    """safetensors by itself leaves files that the owner alone can read."""
    save_checkpoint(folder, models["var"])
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes[MODEL_FILE] == modes["config.json"]
