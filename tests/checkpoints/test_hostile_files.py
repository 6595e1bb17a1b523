"""Files made to harm, or badly broken: refused in one line that names them, soon,
in little memory, without running anything, and with nothing left beside them.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import checking
import pytest
import torch

from dmoe_var import load_var, load_vqvae
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.errors import CheckpointError

PATCH_NUMS = (1, 2, 3, 4)
SOON = 5
"""Seconds of the processor. What loads a tiny model takes well under one."""
SPARE = 2**31
"""Bytes of addresses that a load may take: the files here hold less than a megabyte."""
STATM = Path("/proc/self/statm")


class TooSlow(BaseException):
    """No loader catches it."""


@contextmanager
def soon():
    """Ends what takes too long, or would fill the memory of the machine."""

    def stop(*_):
        raise TooSlow

    before, limits = signal.signal(signal.SIGPROF, stop), resource.getrlimit(resource.RLIMIT_AS)
    if STATM.exists():
        now = int(STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + SPARE, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SOON)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def assert_refused(load, path, *said):
    beside = sorted(os.listdir(path.parent))
    with soon():
        checking.assert_refused(load, path, *said)
    assert sorted(os.listdir(path.parent)) == beside


def vqvae_of(path):
    return load_vqvae(path, PATCH_NUMS)


def save_changed(path, model, **changes):
    torch.save({**model.state_dict(), **changes}, path)
    return path


# Pickles


def with_pickle(path, model, content):
    """A file whose tensors are whole and whose pickle is this."""
    whole = path.with_name("whole.pth")
    torch.save(model.state_dict(), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, content if is_pickle else old.read(entry))
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02.",
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + bytes(7) + b"\x10\x85R.",
        b"\x80\x02cdmoe_var.models.var\nVAR\n)R.",
    ],
    ids=["stops", "deep", "exbibytes", "class"],
)
def test_pickles(make_var, tmp_path, content):
    assert_refused(load_var, with_pickle(tmp_path / "var.pth", make_var(), content))


class Shell:
    """Unpickling this runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_command_is_never_run(make_var, tmp_path, zipped):
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    content = {**make_var().state_dict(), "evil": Shell(f"touch {made}")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_refused(load_var, path, "which may be code")
    assert_refused(vqvae_of, path, "which may be code")
    assert not made.exists()


# Archives


@pytest.mark.parametrize("zipped", [True, False])
def test_any_bytes_are_refused_or_load(tmp_path, zipped):
    """Random damage, always the same, raises no error but ours."""
    path, draw = tmp_path / "var.pth", random.Random(0)
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.choice((len(content), draw.randrange(len(content))))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_refused(load_var, path)  # whole or not, this is no VAR


# Tensors


ODD = {
    "sparse": ("head.weight", lambda t: t.to_sparse()),
    "complex": ("head.weight", lambda t: t.to(torch.complex64)),
    "integers": ("head.weight", lambda t: t.long()),
    "quantised": ("head.weight", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "without data": ("head.weight", lambda t: t.to("meta")),
    "one number": ("head.weight", lambda t: t[:1, :1].clone().expand(t.shape)),
    "transposed": ("head.weight", lambda t: t.T.contiguous().T),
    "one half": ("blocks.0.ffn.fc1.weight", lambda t: t.to(torch.float16)),
    "float8": ("blocks.0.ffn.fc1.weight", lambda t: t.to(torch.float8_e4m3fn)),
    "scales bool": ("lvl_1L", lambda t: t.bool()),
    "scales float": ("lvl_1L", lambda t: t.float()),
    "scales without data": ("lvl_1L", lambda t: t.to("meta")),
    "scales none": ("lvl_1L", lambda t: t[:, :0].clone()),
    "scales huge": ("lvl_1L", lambda t: t + 2**40),
    "scales backwards": ("lvl_1L", lambda t: t.flip(1)),
    "scales skipped": ("lvl_1L", lambda t: t * 2),
    "mask open": ("attn_bias_for_masking", torch.zeros_like),
    "a trainable buffer": ("blocks.0.attn.zero_k_bias", torch.nn.Parameter),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_are_refused_or_work(make_var, make_teacher, tmp_path, name):
    """A loaded model is one: the tables as built, one precision, parameters that train."""
    fresh, (key, change) = make_var(), ODD[name]
    path = save_changed(tmp_path / "var.pth", fresh, **{key: change(fresh.state_dict()[key])})
    try:
        with soon():
            var = load_var(path)
    except CheckpointError:
        assert_refused(load_var, path)
        return
    assert [n for n, _ in var.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    assert not any(buffer.requires_grad for buffer in var.buffers())
    assert torch.equal(var.lvl_1L, fresh.lvl_1L)
    assert torch.equal(var.attn_bias_for_masking, fresh.attn_bias_for_masking)
    loss = var(torch.tensor([0, 1]), make_teacher(var)).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in var.parameters():
            parameter -= 1e-3 * parameter.grad
    assert loss.isfinite()


@pytest.mark.parametrize("start", [0, 32])
def test_two_names_for_one_memory(make_var, tmp_path, start):
    """Whole or in part: a step on one would move the other."""
    ones = torch.ones(100)
    shared = {"blocks.0.attn.q_bias": ones[:64], "blocks.0.attn.v_bias": ones[start : start + 64]}
    path = save_changed(tmp_path / "var.pth", make_var(), **shared)
    assert_refused(load_var, path, "q_bias", "v_bias", "share memory")


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_mask_is_not_built_for_scales_that_the_file_has_none_for(make_var, tmp_path, as_folder):
    """66,100 tokens take 0.5 MB to name, and a mask of them 22 GB: it has to be in the file."""
    scales = (60, 250)
    var, path = make_var(patch_nums=(1, 2), width=1, num_heads=1), tmp_path / "var"
    tokens = torch.tensor([side * side for side in scales])
    var.pos_start = torch.nn.Parameter(torch.zeros(1, int(tokens[0]), 1))
    var.pos_1LC = torch.nn.Parameter(torch.zeros(1, int(tokens.sum()), 1))
    var.lvl_1L = torch.arange(2).repeat_interleave(tokens)[None]
    if as_folder:
        save_checkpoint(path, var)
        content = json.loads((path / "config.json").read_text())
        content["config"]["patch_nums"] = scales
        (path / "config.json").write_text(json.dumps(content))
    else:
        torch.save(var.state_dict(), path)
    with soon(), pytest.raises(CheckpointError) as caught:
        load_var(path)
    assert "allocate" not in str(caught.value)


def test_a_key_of_several_lines(make_var, tmp_path):
    one = {"blocks.0.a\r\nb": torch.zeros(1)}
    assert_refused(load_var, save_changed(tmp_path / "var.pth", make_var(), **one))


def test_a_model_claimed_to_be_endless(make_var, tmp_path):
    """A file of a few kilobytes: one number stands for 64 * 10**12."""
    classes = torch.zeros(1).expand(10**12, 64)
    assert_refused(
        load_var, save_changed(tmp_path / "var.pth", make_var(), **{"class_emb.weight": classes})
    )


@pytest.mark.parametrize("number", [2 * 10**9, int("9" * 4000)], ids=["e9", "e4000"])
def test_a_number_in_a_key(make_var, tmp_path, number):
    one = {f"blocks.{number}.x": torch.zeros(1)}
    assert_refused(load_var, save_changed(tmp_path / "var.pth", make_var(), **one))


# Folders


@pytest.fixture
def folder(make_var, tmp_path):
    save_checkpoint(tmp_path / "var", make_var())
    return tmp_path / "var"


def reconfigure(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["config"].update(change)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 2 * 10**9},
        {"width": 10**30, "num_heads": 1},
        {"num_classes": 10**18},
        {"mlp_ratio": 1e300},
        {"patch_nums": [1, 10**6]},
        {"norm_eps": float("inf")},
        {"experts": {"expert_size": 10**30}},
        {"a\nb": 1},
    ],
    ids=str,
)
def test_absurd_configurations(folder, change):
    reconfigure(folder, change)
    assert_refused(load_var, folder)


@pytest.mark.parametrize("name", ["num_res_blocks", "num_phi"])
def test_absurd_configurations_of_a_vqvae(make_vqvae, tmp_path, name):
    save_checkpoint(tmp_path / "vqvae", make_vqvae())
    reconfigure(tmp_path / "vqvae", {name: 10**9})
    assert_refused(load_vqvae, tmp_path / "vqvae", f"{name} is ")


@pytest.mark.parametrize("content", ["[" * 200_000, '{"kind": "a\\nb"}', "9" * 5000])
def test_absurd_json(folder, content):
    (folder / "config.json").write_text(content)
    assert_refused(load_var, folder, "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_for_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert_refused(load_var, folder, name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_may_not_be_read_says_so(folder, name):
    path = folder / name
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert_refused(load_var, folder, name, "denied")


def test_any_bytes_of_a_folder_are_refused_or_load(folder):
    draw = random.Random(0)
    for name in ("model.safetensors", "config.json"):
        path = folder / name
        whole = path.read_bytes()
        header = min(len(whole), 3000)
        for _ in range(30):
            content = bytearray(whole)
            content[draw.randrange(header)] = draw.randrange(256)
            path.write_bytes(content)
            try:
                with soon():
                    load_var(folder)
            except CheckpointError as error:
                assert "\n" not in str(error)  # noqa: PT017
        path.write_bytes(whole)
