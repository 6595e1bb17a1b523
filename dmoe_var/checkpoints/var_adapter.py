"""Read the shapes of published checkpoints from their state dicts.

Our state-dict names are the published ones, so that nothing is renamed. This file knows how depth,
width and all else follow from names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from dmoe_var.errors import CheckpointError
from dmoe_var.models.var import HEAD_DIM, VARConfig
from dmoe_var.models.vqvae import PATCH_NUMS_256, VQVAEConfig

COUNTER = "quantize.ema_vocab_hit_SV"
"""How often each code was used at each scale while the VQ-VAE was trained."""


def count(tensors: Mapping[str, Tensor], pattern: str, source: str) -> int:
    """Count the numbers, from 0 on, that the pattern finds; raise CheckpointError for gaps."""
    matches = (re.match(pattern, name) for name in tensors)
    numbers = {match[1] for match in matches if match}
    if numbers != {str(i) for i in range(len(numbers))}:
        raise CheckpointError(f"{source}: keys like {pattern} are not numbered from 0 on")
    return len(numbers)


def check_size(config: VARConfig | VQVAEConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError if a configuration is of more modules or tokens than its tensors.

    Building is unsafe without it: a number in a text file can ask for more than any machine has.
    """
    found: dict[str, tuple[object, object]]
    if isinstance(config, VARConfig):
        tokens = config.num_tokens
        found = {
            "depth": (count(tensors, r"blocks\.(\d+)\.", source), config.depth),
            "pos_1LC": (_shape(tensors, "pos_1LC", source, 3), (1, tokens, config.width)),
            "attn_bias_for_masking": (
                _shape(tensors, "attn_bias_for_masking", source, 4),
                (1, 1, tokens, tokens),
            ),
        }
    else:
        found = {
            "levels": (count(tensors, r"encoder\.down\.(\d+)\.", source), len(config.ch_mult)),
            "num_res_blocks": (
                count(tensors, r"encoder\.down\.0\.block\.(\d+)\.", source),
                config.num_res_blocks,
            ),
            "num_phi": (
                count(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.", source),
                config.num_phi if config.num_phi > 1 else 0,
            ),
        }
    for name, (there, said) in found.items():
        if there != said:
            raise CheckpointError(f"{source}: {name} is {there}, its config.json says {said}")


def _shape(tensors: Mapping[str, Tensor], name: str, source: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{source}: missing key {name}; not a published state dict")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim:
        raise CheckpointError(f"{source}: {name} is {shape}, should have {ndim} dimensions")
    return shape


def vqvae_config(
    tensors: Mapping[str, Tensor], patch_nums: Sequence[int] | None, source: str
) -> VQVAEConfig:
    """Derive the shape of a published VQ-VAE.

    patch_nums: not in the file; None means the 256 px schedule. Other ones give the same model, see
    `fit_counter`. Raise CheckpointError for None if the file was trained with another number of
    scales.
    """
    num_scales, vocab_size = _shape(tensors, COUNTER, source, 2)
    schedule = tuple(patch_nums) if patch_nums is not None else PATCH_NUMS_256
    if patch_nums is None and len(schedule) != num_scales:
        raise CheckpointError(
            f"{source}: patch_nums (none given, so the 256 px schedule) has {len(schedule)} "
            f"scales, the file has {num_scales}; give patch_nums"
        )
    levels = count(tensors, r"encoder\.down\.(\d+)\.", source)
    ch = _shape(tensors, "encoder.conv_in.weight", source, 4)[0]
    widths = [
        _shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", source, 4)[0]
        for i in range(levels)
    ]
    phi = "quantize.quant_resi"
    num_phi = count(tensors, rf"{re.escape(phi)}\.qresi_ls\.(\d+)\.", source)
    if f"{phi}.qresi.weight" in tensors:
        num_phi = 1
    kernel = _shape(tensors, "quant_conv.weight", source, 4)[-1]
    return VQVAEConfig(
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=count(tensors, r"encoder\.down\.0\.block\.(\d+)\.", source),
        attention="encoder.mid.attn_1.qkv.weight" in tensors,
        z_channels=_shape(tensors, "quantize.embedding.weight", source, 2)[1],
        vocab_size=vocab_size,
        patch_nums=schedule,
        num_phi=num_phi,
        conv_kernel=kernel,
    )


def fit_counter(tensors: Mapping[str, Tensor], patch_nums: Sequence[int]) -> dict[str, Tensor]:
    """Make the counter of code use anew if it is that of other scales; keep all else.

    It is a statistic of training that nothing computes with, and the only tensor whose shape
    follows from the scales: a published VQ-VAE serves VARs of any schedule.
    """
    counter = tensors[COUNTER]
    if len(counter) == len(patch_nums):
        return dict(tensors)
    return {**tensors, COUNTER: counter.new_zeros(len(patch_nums), *counter.shape[1:])}


def var_config(tensors: Mapping[str, Tensor], source: str) -> VARConfig:
    """Derive the shape of a published VAR. head_dim is 64 if no per-head scale says otherwise."""
    _, _, width = _shape(tensors, "pos_start", source, 3)
    vocab_size, _ = _shape(tensors, "head.weight", source, 2)
    hidden, _ = _shape(tensors, "blocks.0.ffn.fc1.weight", source, 2)
    _shape(tensors, "lvl_1L", source, 2)
    levels = tensors["lvl_1L"]
    whole = not levels.is_floating_point()
    if not whole or not 0 <= int(levels.min()) <= int(levels.max()) < levels.numel():
        raise CheckpointError(f"{source}: lvl_1L holds no scale numbers")
    sides = [round(int(n) ** 0.5) for n in levels.flatten().bincount()]
    scale_mul = "blocks.0.attn.scale_mul_1H11"
    l2_norm = scale_mul in tensors
    mask = _shape(tensors, "attn_bias_for_masking", source, 4)
    if mask != (1, 1, levels.numel(), levels.numel()):
        raise CheckpointError(f"{source}: attn_bias_for_masking is {mask}, of other tokens")
    return VARConfig(
        depth=count(tensors, r"blocks\.(\d+)\.", source),
        width=width,
        num_heads=tensors[scale_mul].shape[1] if l2_norm else max(1, width // HEAD_DIM),
        num_classes=_shape(tensors, "class_emb.weight", source, 2)[0] - 1,
        patch_nums=tuple(sides),
        vocab_size=vocab_size,
        z_channels=_shape(tensors, "word_embed.weight", source, 2)[1],
        mlp_ratio=hidden / width,
        shared_adaln="shared_ada_lin.1.weight" in tensors,
        attn_l2_norm=l2_norm,
    )
