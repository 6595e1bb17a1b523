"""The published layout at every size: keys, shapes and parameter counts, written down here from the
paper's description and never from the model code.

Models of full size stand on the meta device here, or in sparse files (a header, two small tables,
and a hole for the weights), which take neither disk nor memory and load as any other file does.

Legend: C width, H heads, L tokens of all scales, S scales, V vocabulary.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from math import prod

import numpy as np
import pytest
import torch

from dmoe_var import VAR, VQVAE, VARConfig, VQVAEConfig, load_var
from dmoe_var.checkpoints.var_adapter import var_config, vqvae_config
from dmoe_var.models.build import build_strictly

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
CVAE, V, CLASSES = 32, 4096, 1001

# depth: published millions of parameters, gain of the gammas at initialisation
SIZES = {
    16: (310.28, 1e-3),
    20: (600.92, 1e-3),
    24: (1033, 1e-4),
    30: (2010, 1e-5),
    36: (2354, 5e-6),
}
DEPTHS = pytest.mark.parametrize("depth", SIZES)


def patch_nums_of(depth):
    return PATCH_NUMS_512 if depth == 36 else PATCH_NUMS_256


def var_layout(depth):
    """Name -> shape of every tensor of the published VAR of this depth; 36 has shared AdaLN."""
    C, H, S = 64 * depth, depth, 10
    L = sum(p * p for p in patch_nums_of(depth))
    shapes = {
        "pos_start": (1, 1, C),
        "pos_1LC": (1, L, C),
        "lvl_1L": (1, L),
        "attn_bias_for_masking": (1, 1, L, L),
        "word_embed.weight": (C, CVAE),
        "word_embed.bias": (C,),
        "class_emb.weight": (CLASSES, C),
        "lvl_embed.weight": (S, C),
        "head_nm.ada_lin.1.weight": (2 * C, C),
        "head_nm.ada_lin.1.bias": (2 * C,),
        "head.weight": (V, C),
        "head.bias": (V,),
    }
    if depth == 36:
        shapes |= {"shared_ada_lin.1.weight": (6 * C, C), "shared_ada_lin.1.bias": (6 * C,)}
    block = {
        "attn.scale_mul_1H11": (1, H, 1, 1),
        "attn.q_bias": (C,),
        "attn.v_bias": (C,),
        "attn.zero_k_bias": (C,),
        "attn.mat_qkv.weight": (3 * C, C),
        "attn.proj.weight": (C, C),
        "attn.proj.bias": (C,),
        "ffn.fc1.weight": (4 * C, C),
        "ffn.fc1.bias": (4 * C,),
        "ffn.fc2.weight": (C, 4 * C),
        "ffn.fc2.bias": (C,),
    }
    if depth == 36:
        block["ada_gss"] = (1, 1, 6, C)
    else:
        block |= {"ada_lin.1.weight": (6 * C, C), "ada_lin.1.bias": (6 * C,)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def var_parameters(depth):
    """Closed form: attention 4 C^2, FFN 8 C^2, AdaLN 6 C^2 a block (once, where it is shared)."""
    C, S = 64 * depth, 10
    L = sum(p * p for p in patch_nums_of(depth))
    attention_and_ffn = 12 * C * C + 8 * C + depth
    embeddings = (1 + L + CLASSES + S) * C + (CVAE + 1) * C
    head = 2 * C * C + 2 * C + V * C + V
    adaln = depth * 6 * C + 6 * C * (C + 1) if depth == 36 else depth * 6 * C * (C + 1)
    return depth * attention_and_ffn + adaln + embeddings + head


def conv(name, out, into, side):
    return {f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def res_block(name, into, out):
    shapes = norm(f"{name}.norm1", into) | conv(f"{name}.conv1", out, into, 3)
    shapes |= norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out, 3)
    return shapes | (conv(f"{name}.nin_shortcut", out, into, 1) if into != out else {})


def attention(name, channels):
    return (
        norm(f"{name}.norm", channels)
        | conv(f"{name}.qkv", 3 * channels, channels, 1)
        | conv(f"{name}.proj_out", channels, channels, 1)
    )


def middle(name, channels):
    return (
        res_block(f"{name}.mid.block_1", channels, channels)
        | attention(f"{name}.mid.attn_1", channels)
        | res_block(f"{name}.mid.block_2", channels, channels)
    )


def vqvae_layout():
    """Name -> shape of every tensor of vae_ch160v4096z32."""
    widths, low = (160, 160, 320, 320, 640), 640
    shapes = conv("encoder.conv_in", 160, 3, 3) | middle("encoder", low)
    shapes |= conv("decoder.conv_in", low, CVAE, 3) | middle("decoder", low)
    into = 160
    for level, width in enumerate(widths):
        for i in range(2):
            shapes |= res_block(f"encoder.down.{level}.block.{i}", into, width)
            into = width
            if level == 4:
                shapes |= attention(f"encoder.down.4.attn.{i}", width)
        if level < 4:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    into = low
    for level in (4, 3, 2, 1, 0):
        for i in range(3):
            shapes |= res_block(f"decoder.up.{level}.block.{i}", into, widths[level])
            into = widths[level]
            if level == 4:
                shapes |= attention(f"decoder.up.4.attn.{i}", into)
        if level > 0:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", into, into, 3)
    shapes |= norm("encoder.norm_out", low) | conv("encoder.conv_out", CVAE, low, 3)
    shapes |= norm("decoder.norm_out", 160) | conv("decoder.conv_out", 3, 160, 3)
    shapes |= {"quantize.ema_vocab_hit_SV": (10, V), "quantize.embedding.weight": (V, CVAE)}
    for i in range(4):
        shapes |= conv(f"quantize.quant_resi.qresi_ls.{i}", CVAE, CVAE, 3)
    return shapes | conv("quant_conv", CVAE, CVAE, 3) | conv("post_quant_conv", CVAE, CVAE, 3)


def tables(patch_nums):
    """What a VAR stores that is no weight: each token's scale, and who may attend to whom."""
    scale_L = np.concatenate([np.full(p * p, si) for si, p in enumerate(patch_nums)])
    sees_LL = scale_L[:, None] >= scale_L[None, :]
    mask_LL = np.where(sees_LL, np.float32(0), np.float32("-inf"))
    return {"lvl_1L": scale_L.astype("<i8"), "attn_bias_for_masking": mask_LL.astype("<f4")}


def sparse_folder(folder, config, shapes, known):
    """A checkpoint folder whose weights are a hole in the file (and read as zeros)."""
    header, start = {}, 0
    for name in sorted(shapes, key=lambda name: (name not in known, name)):
        dtype = "I64" if name == "lvl_1L" else "F32"
        end = start + prod(shapes[name]) * (8 if dtype == "I64" else 4)
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(known):
            file.write(known[name].tobytes())
        file.truncate(8 + len(text) + start)
    about = {"format": "dmoe-var/1", "kind": "var", "config": config}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def on_no_device(shapes, **given):
    """A state dict that holds shapes alone, but for what is given."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return tensors | given


@DEPTHS
def test_parameter_counts_as_published(depth):
    millions, _ = SIZES[depth]
    counted = var_parameters(depth)
    assert counted / 1e6 == pytest.approx(millions, rel=1e-3 if depth > 20 else 2e-5)
    buffers = ("lvl_1L", "attn_bias_for_masking")
    listed = var_layout(depth).items()
    stored = sum(prod(s) for name, s in listed if name not in buffers and "zero_k" not in name)
    assert stored == counted


def config_of(depth):
    return VARConfig(depth=depth, patch_nums=patch_nums_of(depth), shared_adaln=depth == 36)


@DEPTHS
def test_a_var_of_every_size_has_the_published_tensors(depth):
    shapes = var_layout(depth)
    levels = torch.empty(shapes["lvl_1L"], dtype=torch.int64, device="meta")
    tensors = on_no_device(shapes, lvl_1L=levels)
    var = build_strictly(lambda: VAR(config_of(depth)), tensors, "a file")
    assert {name: tuple(tensor.shape) for name, tensor in var.state_dict().items()} == shapes
    assert sum(p.numel() for p in var.parameters()) == var_parameters(depth)


@pytest.mark.parametrize("depth", [16, pytest.param(36, marks=pytest.mark.slow)])
def test_a_file_of_full_size_loads(tmp_path, depth):
    shapes, patch_nums = var_layout(depth), patch_nums_of(depth)
    config = {"depth": depth, "patch_nums": patch_nums, "shared_adaln": depth == 36}
    known = tables(patch_nums)
    var = load_var(sparse_folder(tmp_path / "var", config, shapes, known))
    assert {name: tuple(tensor.shape) for name, tensor in var.state_dict().items()} == shapes
    floats = {tensor.dtype for name, tensor in var.state_dict().items() if name != "lvl_1L"}
    assert (floats, var.lvl_1L.dtype) == ({torch.float32}, torch.int64)
    for name, table in known.items():
        assert np.array_equal(getattr(var, name).reshape(table.shape).numpy(), table)
    assert var.blocks[-1].ffn.fc2.weight[-1].abs().max() == 0


@DEPTHS
def test_the_adapter_reads_every_size(depth):
    patch_nums, (_, gain) = patch_nums_of(depth), SIZES[depth]
    levels = torch.from_numpy(tables(patch_nums)["lvl_1L"])[None]
    config = var_config(on_no_device(var_layout(depth), lvl_1L=levels), "a file")
    wanted = {
        "depth": depth,
        "width": 64 * depth,
        "num_heads": depth,
        "num_classes": 1000,
        "patch_nums": patch_nums,
        "vocab_size": 4096,
        "z_channels": 32,
        "mlp_ratio": 4.0,
        "activation": "gelu",
        "shared_adaln": depth == 36,
        "attn_l2_norm": True,
        "drop_path": pytest.approx(0.1 * depth / 24),
        "label_drop": 0.1,
        "adaln_gamma_gain": gain,
        "norm_eps": 1e-6,
        "experts": None,
    }
    assert asdict(config) == wanted
    assert config == config_of(depth)


@pytest.mark.parametrize("patch_nums", [PATCH_NUMS_256, PATCH_NUMS_512])
def test_the_vqvae_has_the_published_tensors(patch_nums):
    shapes, config = vqvae_layout(), VQVAEConfig(patch_nums=patch_nums)
    vqvae = build_strictly(lambda: VQVAE(config), on_no_device(shapes), "a file")
    assert {name: tuple(tensor.shape) for name, tensor in vqvae.state_dict().items()} == shapes
    count = sum(p.numel() for p in vqvae.parameters())
    assert count == sum(prod(s) for name, s in shapes.items() if "ema_vocab" not in name)
    assert count / 1e6 == pytest.approx(108.9, abs=0.05)
    assert vqvae.config.image_size == (512 if patch_nums == PATCH_NUMS_512 else 256)


def test_the_adapter_reads_the_vqvae():
    tensors = on_no_device(vqvae_layout())
    assert vqvae_config(tensors, None, "a file") == VQVAEConfig()
    wanted = VQVAEConfig(patch_nums=PATCH_NUMS_512)
    assert vqvae_config(tensors, PATCH_NUMS_512, "a file") == wanted
