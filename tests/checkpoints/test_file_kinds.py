"""What a file is follows from its content; a line says what to do with what is no weights."""

from __future__ import annotations

import io
import tarfile
import zipfile

import pytest
import torch
from checking import assert_refused
from safetensors.torch import save_file

from dmoe_var import load_var
from dmoe_var.checkpoints.file_kinds import kind_of_file


def zipped(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return content.getvalue()


def tarred():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not copied"),
        (bytes(2000), "not copied"),
        (b"version https://git-lfs.github.com/spec/v1\r\noid sha256:0\r\n", "git lfs pull"),
        (b"\r\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\xef\xbb\xbf<html></html>", "web page"),
        (b'{"weight_map": {}}', "JSON"),
        (zipped("var/model.safetensors", "var/config.json"), "unpack"),
        (zipped(), "a zip archive of nothing"),
        (zipped("var/version")[:-9], "broken archive"),
        (tarred(), "unpack"),
        (b"\x1f\x8b\x08" + bytes(64), "unpack"),
        (b"weights go here", "no state dict"),
    ],
)
def test_the_line_says_what_it_is(tmp_path, content, said):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert_refused(load_var, path, said)


def test_names_do_not_count(tmp_path):
    tensors = {"a": torch.zeros(3)}
    save_file(tensors, tmp_path / "a.pth")
    torch.save(tensors, tmp_path / "b.safetensors")
    torch.save(tensors, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    kinds = [kind_of_file(tmp_path / name) for name in ("a.pth", "b.safetensors", "c.bin")]
    assert kinds == ["safetensors", "torch", "torch"]
