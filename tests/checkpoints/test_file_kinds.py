"""What a file is follows from its content; a line says what to do with what is no weights."""

from __future__ import annotations

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmoe_var import load_var, load_vqvae
from dmoe_var.checkpoints.file_kinds import kind_of_file
from dmoe_var.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def zipped(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return content.getvalue()


def arrays():
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3))
    return content.getvalue()


def tarred():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return content.getvalue()


NO_WEIGHTS = {
    "empty": (b"", "empty"),
    "lfs": (POINTER, "git lfs pull"),
    "lfs, CRLF": (POINTER.replace(b"\n", b"\r\n"), "git lfs pull"),
    "html": (b"\r\n<!DOCTYPE html><html>Sign in</html>", "web page"),
    "html, marked": (b"\xef\xbb\xbf<html></html>", "web page"),
    "json": (b'{"weight_map": {}}', "JSON"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x03" + bytes(64), "ONNX"),
    "folder": (zipped("var/model.safetensors", "var/config.json"), "unpack"),
    "script": (zipped("m/data.pkl", "m/constants.pkl", "m/code/a.py"), "TorchScript"),
    "npz": (arrays(), "numpy"),
    "npy": (b"\x93NUMPY" + bytes(64), "numpy"),
    "tar": (tarred(), "unpack"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "unpack"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "unpack"),
    "gguf": (b"GGUF" + bytes(64), "GGUF"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "picture"),
    "zeros": (bytes(2000), "not copied"),
    "text": (b"weights go here", "no state dict"),
}


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_the_line_says_what_it_is(tmp_path, what, name):
    content, said = NO_WEIGHTS[what]
    path = tmp_path / name
    path.write_bytes(content)
    for load in (load_var, load_vqvae):
        with pytest.raises(CheckpointError) as caught:
            load(path)
        message = str(caught.value)
        assert str(path) in message
        assert said in message
        assert "\n" not in message


def test_a_pointer_within_our_folder(make_var, tmp_path):
    """As git leaves a folder that is cloned without LFS."""
    from dmoe_var.checkpoints.safetensors_io import save_checkpoint

    save_checkpoint(tmp_path / "var", make_var())
    (tmp_path / "var" / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_var(tmp_path / "var")


def test_names_do_not_count(tmp_path):
    tensors = {"a": torch.zeros(3)}
    save_file(tensors, tmp_path / "a.pth")
    torch.save(tensors, tmp_path / "b.safetensors")
    torch.save(tensors, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    kinds = [kind_of_file(tmp_path / name) for name in ("a.pth", "b.safetensors", "c.bin")]
    assert kinds == ["safetensors", "torch", "torch"]
