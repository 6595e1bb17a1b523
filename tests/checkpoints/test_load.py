"""load_vqvae and load_var: published files (never running code), our folders, published names."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checking import assert_refused, same
from safetensors.torch import save_file

from dmoe_var import DynamicVAR, load_var, load_vqvae
from dmoe_var.checkpoints import hub
from dmoe_var.checkpoints.load import file_dtype, weights_file
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.checkpoints.tensor_files import write_tensors
from dmoe_var.errors import CheckpointError

PATCH_NUMS = (1, 2, 3, 4)


def save_pth(path, model, **changes):
    """As the published code saves: an OrderedDict of tensors. None removes a key."""
    state = OrderedDict(model.state_dict(), **changes)
    torch.save(OrderedDict((k, t) for k, t in state.items() if t is not None), path)
    return path


def vqvae_of(path):
    return load_vqvae(path, PATCH_NUMS)


@pytest.fixture
def forgotten():
    """No published name has been fetched yet; and none is remembered afterwards."""
    hub.fetch.cache_clear()
    yield
    hub.fetch.cache_clear()


# Published files


def test_shapes_of_the_parity_models(parity):
    told, vqvae, var = parity.config, parity.vqvae.config, parity.var.config
    assert (vqvae.ch, vqvae.z_channels, vqvae.vocab_size) == (32, 32, 64)
    assert list(vqvae.ch_mult) == told["ch_mult"]
    assert vqvae.num_phi == told["share_quant_resi"]
    assert vqvae.image_size == told["resolution"]
    assert list(vqvae.patch_nums) == list(var.patch_nums) == told["patch_nums"]
    for name in ("depth", "width", "num_heads", "num_classes"):
        assert getattr(var, name) == told[name]
    assert (var.shared_adaln, var.attn_l2_norm) == (told["shared_aln"], told["attn_l2_norm"])
    assert (var.vocab_size, var.z_channels, var.activation) == (64, 32, "gelu")
    assert not any(module.training for module in (parity.vqvae, parity.var))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attn_l2_norm": False, "width": 192, "num_heads": 3},
        {"shared_adaln": True, "num_heads": 4},
        {"depth": 11, "width": 32},
        {"mlp_ratio": 2.0, "patch_nums": (2, 3, 5), "num_classes": 1},
    ],
    ids=str,
)
def test_any_var(make_var, tmp_path, fields):
    var = make_var(**fields)
    loaded = load_var(save_pth(tmp_path / "var.pth", var))
    assert same(loaded, var)
    for name in ("depth", "width", "num_heads", "num_classes", "patch_nums", "mlp_ratio"):
        assert getattr(loaded.config, name) == getattr(var.config, name)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_phi": 0, "attention": False},
        {"num_phi": 1, "conv_kernel": 1, "num_res_blocks": 2},
        {"num_phi": 2, "ch_mult": (1, 2, 2), "z_channels": 4, "vocab_size": 7},
    ],
    ids=str,
)
def test_any_vqvae(make_vqvae, tmp_path, fields):
    vqvae = make_vqvae(**fields)
    loaded = vqvae_of(save_pth(tmp_path / "vae.pth", vqvae))
    assert same(loaded, vqvae)
    assert loaded.config == vqvae.config


def test_patch_nums_default_to_the_256_px_schedule(make_vqvae, tmp_path):
    schedule = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    path = save_pth(tmp_path / "vae.pth", make_vqvae(patch_nums=schedule))
    assert load_vqvae(path).config.patch_nums == schedule


@pytest.mark.parametrize(
    ("patch_nums", "said"),
    [
        (None, ("patch_nums", "10 scales", "4", "give patch_nums")),
        ((1, 2, 3, 3), ("patch_nums", "(1, 2, 3, 3)")),
    ],
)
def test_patch_nums_that_cannot_be(make_vqvae, tmp_path, patch_nums, said):
    path = save_pth(tmp_path / "vae.pth", make_vqvae())
    assert_refused(load_vqvae, path, *said, patch_nums=patch_nums)


@pytest.mark.parametrize("patch_nums", [(1, 4), (1, 2, 3, 4, 5)])
def test_a_vqvae_serves_any_scales(make_vqvae, tmp_path, patch_nums):
    """The counter of code use alone is of the scales of its training, and nothing reads it."""
    vqvae, counter = make_vqvae(), "quantize.ema_vocab_hit_SV"
    loaded = load_vqvae(save_pth(tmp_path / "vae.pth", vqvae), patch_nums)
    assert loaded.config.patch_nums == patch_nums
    ours, given = loaded.state_dict(), vqvae.state_dict()
    assert ours.pop(counter).shape == (len(patch_nums), 32)
    assert all(torch.equal(tensor, given[name]) for name, tensor in ours.items())
    size = loaded.config.image_size
    tokens = loaded.encode(torch.zeros(2, 3, size, size))
    assert [t.shape[1] for t in tokens] == [p * p for p in patch_nums]


def test_a_vqvae_of_other_scales_agrees_with_the_published_code(parity, tmp_path):
    """A counter cut to fewer scales, as another schedule leaves it: tokens stay the published."""
    state = torch.load(parity.vae_path, weights_only=True)
    counter = "quantize.ema_vocab_hit_SV"
    state[counter] = state[counter][:2]
    torch.save(state, tmp_path / "vae.pth")
    vqvae = load_vqvae(tmp_path / "vae.pth", parity.config["patch_nums"])
    for si, tokens in enumerate(vqvae.encode(parity.io["image"])):
        assert torch.equal(tokens, parity.io[f"tokens.{si}"])


# Safetensors files


@pytest.fixture(params=["relu", "gelu"])
def ours(request, make_var, tmp_path):
    """A checkpoint folder of ours, whose tensors do not tell the activation."""
    var = make_var(activation=request.param)
    save_checkpoint(tmp_path / "ours", var)
    return tmp_path / "ours", var


def test_a_file_in_our_folder_is_the_folder(ours):
    folder, var = ours
    for path in (folder / "model.safetensors", folder / "best.pth"):  # a name says nothing
        if not path.exists():
            (folder / "model.safetensors").rename(path)
        loaded = load_var(path)
        assert loaded.config == var.config
        assert same(loaded, var)


def test_a_file_of_ours_alone_is_refused(ours, tmp_path):
    """It would be read as a GELU."""
    path = (ours[0] / "model.safetensors").rename(tmp_path / "alone.safetensors")
    assert_refused(load_var, path, "config.json")
    (tmp_path / "config.json").write_text('{"architectures": ["VAR"]}')  # somebody else's
    assert_refused(load_var, path, "config.json")


def test_published_tensors_as_safetensors(make_var, make_vqvae, tmp_path):
    for load, model in ((load_var, make_var()), (vqvae_of, make_vqvae())):
        save_file(model.state_dict(), tmp_path / "bare.safetensors", {"format": "pt"})
        loaded = load(tmp_path / "bare.safetensors")
        assert same(loaded, model)
        assert loaded.config == model.config


def test_a_training_state_is_no_model(make_var, tmp_path):
    path = tmp_path / "state.safetensors"
    tensors = {f"model/{name}": tensor for name, tensor in make_var().state_dict().items()}
    write_tensors(path, tensors, {"state": "{}"})
    assert_refused(load_var, path, "not finished", "checkpoint/")


def test_a_saved_dynamic_model_is_no_base(make_var, make_moe, tmp_path):
    DynamicVAR(make_var(), make_moe(make_var()), (2, 3)).save_pretrained(tmp_path / "both")
    assert_refused(load_var, tmp_path / "both", "DynamicVAR.from_pretrained")
    with pytest.raises(CheckpointError, match=r"DynamicVAR\.from_pretrained"):
        load_var(tmp_path / "both" / "model.safetensors")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "both" / "model.safetensors").read_bytes())
    assert_refused(load_var, alone, "DynamicVAR.from_pretrained")


# Folders of folders


def test_the_folder_of_a_stage(make_var, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "train_var" / "default" / "checkpoint", make_var())
    assert same(load_var(tmp_path / "train_var" / "default"), make_var())
    file = tmp_path / "train_var" / "default" / "checkpoint" / "model.safetensors"
    assert weights_file(tmp_path / "train_var" / "default", "var") == file
    assert_refused(load_var, tmp_path / "train_var", f"give one of {tmp_path}/train_var/default")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(load_var("~/train_var/default"), make_var())


def test_a_folder_of_published_files(make_var, tmp_path):
    """As a download of the whole repository is, and the hub's cache around it."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    save_pth(snapshot / "var_d16.pth", make_var())
    assert_refused(load_var, snapshot, "config.json", f"give one of {snapshot}/var_d16.pth")
    assert_refused(load_var, tmp_path / "models--a--b", f"give one of {snapshot}")


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_has_the_precision_of_its_file(make_var, tmp_path, dtype):
    path = save_pth(tmp_path / "var.pth", make_var().to(dtype))
    assert {p.dtype for p in load_var(path).parameters()} == {dtype}
    assert file_dtype(path, "var") == str(dtype).removeprefix("torch.")


def test_several_precisions_become_the_one_that_loses_nothing(make_var, tmp_path):
    var = make_var()
    state = {n: t.bfloat16() if n.startswith("blocks") else t for n, t in var.state_dict().items()}
    torch.save(state, tmp_path / "var.pth")
    loaded = load_var(tmp_path / "var.pth")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(t.float(), state[n].float()) for n, t in loaded.state_dict().items())
    assert file_dtype(tmp_path / "var.pth", "var") == "bfloat16, float32"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("left", [1, 0.5, -1])
def test_truncated_files(make_var, tmp_path, zipped, left):
    path = tmp_path / "cut.pth"
    torch.save(make_var().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if left == 0.5 else left])
    assert_refused(load_var, path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("head.weight", None, ["missing", "head.weight"]),
        ("blocks.1.ffn.fc1.bias", None, ["missing", "blocks.1.ffn.fc1.bias"]),
        ("extra", torch.zeros(1), ["unexpected", "extra"]),
        ("blocks.1.ffn.fc1.bias", torch.zeros(3), ["blocks.1.ffn.fc1.bias", "(3,)", "(256,)"]),
        ("pos_start", torch.zeros(3), ["pos_start is (3,), should have 3 dimensions"]),
        ("blocks.0.attn.scale_mul_1H11", torch.zeros(1, 3, 1, 1), []),
    ],
)
def test_var_files_that_do_not_fit(make_var, tmp_path, key, value, said):
    path = save_pth(tmp_path / "var.pth", make_var(), **{key: value})
    assert_refused(load_var, path, *said)


@pytest.mark.parametrize("key", ["quantize.embedding.weight", "decoder.conv_out.bias"])
def test_vqvae_files_that_do_not_fit(make_vqvae, tmp_path, key):
    path = save_pth(tmp_path / "vae.pth", make_vqvae(), **{key: None})
    assert_refused(vqvae_of, path, "missing", key)


# Files that are whole, in another form


def repacked(path, compression):
    """The same archive, written by a zip tool: compressed, or stored without torch's alignment."""
    packed = path.with_name(f"packed_{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return packed


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_that_a_zip_tool_wrote(make_var, tmp_path, compression):
    """A compressed entry mapped into memory as it is would be other weights, silently."""
    var = make_var()
    assert same(load_var(repacked(save_pth(tmp_path / "var.pth", var), compression)), var)


def test_a_state_dict_of_parameters(make_var, tmp_path):
    """As `dict(model.named_parameters())` leaves them: what trains is the model's own matter."""
    var = make_var()
    tensors = {
        name: torch.nn.Parameter(tensor, requires_grad="bias" in name)
        for name, tensor in var.state_dict().items()
        if tensor.is_floating_point()
    }
    loaded = load_var(save_pth(tmp_path / "var.pth", var, **tensors))
    assert same(loaded, var)
    assert [name for name, _ in loaded.named_parameters()] == [n for n, _ in var.named_parameters()]
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(buffer.requires_grad for buffer in loaded.buffers())


# Our folders


def test_folders(make_vqvae, make_var, make_moe, tmp_path):
    vqvae, moe = make_vqvae(), make_moe(make_var())
    save_checkpoint(tmp_path / "vqvae", vqvae)
    save_checkpoint(tmp_path / "moe", moe)
    assert same(load_vqvae(str(tmp_path / "vqvae")), vqvae)
    assert same(load_vqvae(tmp_path / "vqvae", list(PATCH_NUMS)), vqvae)
    assert same(load_var(tmp_path / "moe", vqvae), moe)
    assert_refused(load_vqvae, tmp_path / "vqvae", "patch_nums", patch_nums=(1, 2, 3, 5))
    assert_refused(load_var, tmp_path / "vqvae", "kind='vqvae'")
    assert_refused(load_vqvae, tmp_path / "moe", "kind='var'")


@pytest.mark.parametrize(
    ("save", "name", "value"),
    [(save_checkpoint, "vocab_size", 64), (save_pth, "patch_nums", (1, 2, 3, 5))],
)
def test_a_var_of_another_vqvae(make_vqvae, make_var, tmp_path, save, name, value):
    save(tmp_path / "var", make_var())
    other = make_vqvae(**{name: value})
    assert_refused(load_var, tmp_path / "var", name, str(value), vqvae=other)


def test_no_such_source():
    assert_refused(load_var, "var_d17", "no such file", "var_d16")
    assert_refused(load_vqvae, "/nowhere/vae.pth", "no such file")


# Names


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_packaged_base_models(name):
    vqvae = load_vqvae(name)
    var = load_var(name, vqvae)
    assert (var.config.num_classes, var.config.patch_nums) == (10, vqvae.config.patch_nums)
    assert not var.training


def test_a_name_is_the_packaged_model_and_a_path_the_folder(make_var, tmp_path, monkeypatch):
    """A folder of a packaged model's name does not hide it; a path never means the package."""
    var = make_var()
    save_checkpoint(tmp_path / "digits", var)
    monkeypatch.chdir(tmp_path)
    assert load_var("digits").config.num_classes == 10
    assert weights_file("digits", "var").is_relative_to(Path(hub.__file__).parent)
    for path in ("./digits", tmp_path / "digits"):
        assert same(load_var(path), var), path
        assert weights_file(path, "var").samefile("digits/model.safetensors")


@pytest.mark.parametrize("source", ["", ".", "/", "a\0b", "x" * 5000, "digits/digits"])
def test_sources_that_are_nothing(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_var(source)
    assert "\n" not in str(caught.value)


def test_published_names_come_through_the_hub(parity, monkeypatch, forgotten):
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(parity.vae_path if name.startswith("vae") else parity.var_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    vqvae = load_vqvae("vae_ch160v4096z32", parity.config["patch_nums"])
    assert same(load_var("var_d16", vqvae), parity.var)
    assert asked == [
        ("FoundationVision/var", "vae_ch160v4096z32.pth"),
        ("FoundationVision/var", "var_d16.pth"),
    ]
