"""Makes the parity data beside this file: what the published VAR code computes of two models.

    python tests/parity/make.py CHECKOUT

CHECKOUT: a checkout of github FoundationVision/VAR; the data are of commit 78b9539, in float32 on
one CPU thread. Weights and inputs are those of formula.py, so that only outputs are stored.
NAME.json: the shape of the models, and that of every tensor of their state dicts. NAME.safetensors:
those tensors that are no weights, and the outputs; of images only every third row and column.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from formula import exponential_, images, weight
from safetensors.torch import save_file

BESIDE = Path(__file__).parent
COMMON = {"vocab_size": 64, "z_channels": 32, "ch": 32, "ch_mult": [1, 1, 2, 2, 4]}
COMMON |= {"width": 64, "num_heads": 2, "num_classes": 10, "attn_l2_norm": True}
COMMON |= {"share_quant_resi": 4, "resolution": 64, "pixel_step": 3, "labels": [3, 7]}
CONFIGS = {
    "separate": {"patch_nums": [1, 2, 3, 4], "depth": 2, "shared_aln": False},
    "shared": {"patch_nums": [1, 3, 4], "depth": 3, "shared_aln": True},
}
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def multinomial(probabilities, num_samples, replacement, generator):
    """One draw a row, as torch makes it, with draws that no build changes."""
    assert num_samples == 1
    noise = exponential_(torch.empty_like(probabilities), generator=generator)
    return (probabilities / noise).argmax(-1, keepdim=True)


@torch.no_grad()
def fill(model, prefix, shapes, tensors):
    """Weights by formula; notes the shapes, and the tensors that are no weights."""
    for name, tensor in model.state_dict().items():
        shapes[prefix + name] = list(tensor.shape)
        if name.endswith(BUFFERS):
            tensors[prefix + name] = tensor.clone()
        else:
            tensor.copy_(weight(name, tuple(tensor.shape)))


def outputs(vae, var, config):
    """Of one pair of models."""
    label, V = torch.tensor(config["labels"]), config["vocab_size"]
    image = images(len(label), config["resolution"])
    tokens = vae.img_to_idxBl(image)
    teacher = vae.quantize.idxBl_to_var_input(tokens)
    found = {
        "encoder_features": vae.quant_conv(vae.encoder(image)),
        "reconstruction": vae.idxBl_to_img(tokens, same_shape=True, last_one=True),
        "teacher_input": teacher,
        "logits": var(label, teacher),
    }
    found |= {f"tokens.{si}": of_scale for si, of_scale in enumerate(tokens)}

    def draw(name, **options):
        found[name] = var.autoregressive_infer_cfg(len(label), label, **options)

    for cfg in (0.0, 1.5, 4.0):
        draw(f"greedy_image.cfg{cfg}", g_seed=0, cfg=cfg, top_k=1)
    draw("sampled_image.cfg1.5.seed0", g_seed=0, cfg=1.5, top_k=V // 4, top_p=0.96)
    smooth = {"top_k": V // 4, "top_p": 0.95, "more_smooth": True}
    draw("sampled_image.cfg4.seed3.smooth", g_seed=3, cfg=4, **smooth)
    step = config["pixel_step"]
    for name in found:
        if "image" in name or name == "reconstruction":
            found[name] = found[name][..., ::step, ::step]
    return found


@torch.no_grad()
def main(checkout):
    sys.path.insert(0, checkout)
    from models import VAR, VQVAE

    torch.set_num_threads(1)
    torch.multinomial, torch.Tensor.exponential_ = multinomial, exponential_
    for name, fields in CONFIGS.items():
        config, shapes, tensors = COMMON | fields, {}, {}
        vae = VQVAE(
            vocab_size=config["vocab_size"],
            z_channels=config["z_channels"],
            ch=config["ch"],
            share_quant_resi=config["share_quant_resi"],
            v_patch_nums=config["patch_nums"],
        )
        var = VAR(
            vae,
            num_classes=config["num_classes"],
            depth=config["depth"],
            embed_dim=config["width"],
            num_heads=config["num_heads"],
            shared_aln=config["shared_aln"],
            cond_drop_rate=0.0,
            attn_l2_norm=config["attn_l2_norm"],
            patch_nums=config["patch_nums"],
        )
        fill(vae.eval(), "vae.", shapes, tensors)
        fill(var.eval(), "var.", shapes, tensors)
        found = outputs(vae, var, config)
        save_file({k: t.contiguous() for k, t in {**tensors, **found}.items()}, path(name))
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in shapes.items())
        shown = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in config.items())
        path(name, "json").write_text(f'{{\n{shown},\n "shapes": {{\n{lines}\n }}\n}}\n')


def path(name, kind="safetensors"):
    return BESIDE / f"{name}.{kind}"


if __name__ == "__main__":
    main(sys.argv[1])
