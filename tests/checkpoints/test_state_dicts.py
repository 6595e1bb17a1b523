"""Trainers' checkpoints and wrapped state dicts load as the bare ones, strictly; what else a file
holds is said in one line."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict

import pytest
import torch
from checking import assert_refused, same
from safetensors.torch import save_file

from dmoe_var import load_var, load_vqvae

PATCH_NUMS = (1, 2, 3, 4)


def renamed(state, word):
    return OrderedDict((f"{word}{name}", tensor) for name, tensor in state.items())


def compiled_blocks(state):
    """As where each block was compiled by itself."""
    return {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in state.items()}


def optimiser(var):
    """The state of AdamW after a step, as the published trainer nests it."""
    moments = {
        i: {"step": torch.tensor(1.0), "exp_avg": p.data, "exp_avg_sq": p.data**2}
        for i, p in enumerate(var.parameters())
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.95), "fused": True, "params": list(moments), "lr_sc": 1}
    state = {"state": moments, "param_groups": [group]}
    return {"optimizer": state, "scaler": {"scale": 2.0, "_growth_tracker": 0}}


@pytest.fixture
def trainer(make_var, make_vqvae):
    """What the published trainer saves after an epoch, with these two models."""
    var, vqvae = make_var(), make_vqvae()
    settings = {"patch_nums": PATCH_NUMS, "resos": (2, 4, 6, 8), "prog_it": 3, "first_prog": True}
    return {
        "epoch": 10,
        "iter": 0,
        "trainer": {
            "config": settings,
            "var_wo_ddp": var.state_dict(),
            "vae_local": vqvae.state_dict(),
            "var_opt": optimiser(make_var()),
        },
        "args": OrderedDict(depth=2, pn="1_2_3_4", patch_nums=PATCH_NUMS, seed=None, tlr=1e-4),
    }


def test_the_published_trainer_s_checkpoint(trainer, make_var, make_vqvae, tmp_path):
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save(trainer, path)
    vqvae = load_vqvae(path, PATCH_NUMS)
    assert same(vqvae, make_vqvae())
    assert same(load_var(path, vqvae), make_var())


@pytest.mark.parametrize(("part", "load"), [("var_wo_ddp", load_var), ("vae_local", load_vqvae)])
def test_a_trainer_s_checkpoint_without_a_part(trainer, tmp_path, part, load):
    del trainer["trainer"][part]
    torch.save(trainer, tmp_path / "cut.pth")
    other = {"var_wo_ddp": "load_vqvae", "vae_local": "load_var"}[part]
    assert_refused(load, tmp_path / "cut.pth", f": {other}, base")


def test_a_trainer_s_checkpoint_is_read_strictly(trainer, tmp_path):
    del trainer["trainer"]["var_wo_ddp"]["head.bias"]
    trainer["trainer"]["var_wo_ddp"]["more"] = torch.zeros(1)
    torch.save(trainer, tmp_path / "var.pth")
    said = "missing 1 keys: head.bias; unexpected 1 keys: more"
    assert_refused(load_var, tmp_path / "var.pth", said)


WRAPPED = {
    "module": lambda s: renamed(s, "module."),
    "compiled": lambda s: renamed(s, "_orig_mod."),
    "both": lambda s: renamed(s, "_orig_mod.module."),
    "each block": compiled_blocks,
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": renamed(s, "module."), "best": 0.5},
    "a larger module": lambda s: {"state_dict": {**renamed(s, "net.var."), "x": torch.zeros(1)}},
    "one under two names": lambda s: {"model": s, "ema": s},
    "options": lambda s: {"model": s, "args": argparse.Namespace(depth=2, name="a")},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_state_dicts(make_var, tmp_path, name):
    content = WRAPPED[name](make_var().state_dict())
    torch.save(content, tmp_path / "var.pth")
    assert same(load_var(tmp_path / "var.pth"), make_var())


def test_a_wrapped_safetensors_file(make_vqvae, tmp_path):
    save_file(renamed(make_vqvae().state_dict(), "module."), tmp_path / "vae.safetensors")
    assert same(load_vqvae(tmp_path / "vae.safetensors", PATCH_NUMS), make_vqvae())


def test_one_of_several_is_not_guessed(make_var, tmp_path):
    state = make_var().state_dict()
    torch.save({"model": state, "ema": {k: t + 1 for k, t in state.items()}}, tmp_path / "var.pth")
    said = "several state dicts of a VAR: model, ema; save"
    assert_refused(load_var, tmp_path / "var.pth", said)
    torch.save({**renamed(state, "module."), **state}, tmp_path / "var.pth")
    assert_refused(load_var, tmp_path / "var.pth", "is there twice")


def test_an_endless_file_ends(tmp_path):
    """Dictionaries within each other, in a circle."""
    content = {"a": {}}
    content["a"]["b"] = content
    torch.save(content, tmp_path / "var.pth")
    assert_refused(load_var, tmp_path / "var.pth", "not a state dict of a VAR")


class Code:
    def __reduce__(self):
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)},
            "found conv1.weight, fc.bias",
        ),
        ([torch.zeros(1)], "found list"),
        ({}, "found nothing"),
        ({"epoch": 3, "a\nb": {}}, "found epoch, a b"),
        ({"model": Code()}, "posix.getcwd, which may be code"),
    ],
    ids=["other", "list", "nothing", "numbers", "code"],
)
def test_what_holds_no_such_model(tmp_path, content, said):
    torch.save(content, tmp_path / "x.pth")
    for load in (load_var, load_vqvae):
        assert_refused(load, tmp_path / "x.pth", said)


def test_a_state_dict_with_more_than_tensors(make_var, tmp_path):
    torch.save({**make_var().state_dict(), "epoch": 3}, tmp_path / "var.pth")
    assert_refused(load_var, tmp_path / "var.pth", "epoch is int")


def test_var_and_vqvae_the_other_way_round(make_var, make_vqvae, tmp_path):
    torch.save(make_var().state_dict(), tmp_path / "var.pth")
    save_file(make_vqvae().state_dict(), tmp_path / "vae.safetensors")
    said = "holds a VAR, not a VQ-VAE: load_var, base.var"
    assert_refused(load_vqvae, tmp_path / "var.pth", said)
    said = "holds a VQ-VAE, not a VAR: load_vqvae, base.vqvae"
    assert_refused(load_var, tmp_path / "vae.safetensors", said)
