"""Routers that are told scale and class: by direct float64, while sampling, and in files.

Legend: B batch, L tokens, C width, R router hidden width, E experts.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from checking import assert_refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from dmoe_var import DynamicVAR, count_flops, generate
from dmoe_var.conversion.to_moe import informed
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.router import Context, Router

CONDITIONS = ("scale", "class", "both")
SCALES = (1, 3)


def by_hand(router, normed_LC, si, label):
    """The scores (L, E) of tokens of one row and one scale."""
    z_LR = normed_LC @ router.fc1.weight.T
    if router.condition != "class":
        z_LR = z_LR + router.scale_embed_SR[si]
    if router.condition != "scale":
        z_LR = z_LR + router.class_embed_KR[label]
    gelu_LR = 0.5 * z_LR * (1 + torch.erf(z_LR / math.sqrt(2)))
    return (gelu_LR @ router.fc2.weight.T).abs()


@torch.no_grad()
def fill(model, seed=5):
    """Give all vectors of scales and classes values that show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "_embed_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=CONDITIONS)
def moe(request, make_var, make_moe):
    """A tiny VAR of 5 classes and 4 scales."""
    return fill(informed(make_moe(make_var(seed=1, activation="relu")), request.param).double())


@pytest.fixture(scope="module")
def model(moe, make_var):
    return DynamicVAR(make_var(seed=0).double(), moe, SCALES)


class Scores(Observer):
    def __init__(self, model):
        self.seen, self.inputs = [], []
        for block in model.moe.blocks:
            block.ffn.register_forward_pre_hook(lambda _, args: self.inputs.append(args))

    def on_routing(self, routed):
        self.seen.append(routed)


def test_values_of_one_scale_and_of_a_scale_for_each_token(moe):
    router, labels_B = moe.blocks[0].ffn.router, torch.tensor([2, 5])
    x_BLC = torch.randn(2, 3, 64, dtype=torch.float64)
    si_L = torch.tensor([0, 3, 1])
    found_BLE = router(x_BLC.roll(1), Context(x_BLC, si_L, labels_B))
    for b, label in enumerate(labels_B):
        for i, si in enumerate(si_L):
            expected_LE = by_hand(router, x_BLC[b], si, label)
            one_BLE = router(x_BLC, Context(x_BLC, int(si), labels_B))
            assert_close(found_BLE[b, i], expected_LE[i], rtol=0, atol=1e-12)
            assert_close(one_BLE[b], expected_LE, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="needs scale and class"):
        router(x_BLC)


@pytest.mark.parametrize("share_mask", [False, True])
@pytest.mark.parametrize("cfg", [1.5, (1, 1, 1, 0)])
def test_sampling_tells_scale_and_class_of_each_row(model, make_vqvae, cfg, share_mask):
    """The unconditional rows have the null class, also once they are left out; what is read is the
    hidden state before AdaLN."""
    labels, scores = [1, 4, 1], Scores(model)
    given = {"cfg": cfg, "tau": 0.6, "share_mask": share_mask, "observer": scores}
    generate(model, make_vqvae().double(), labels, **given)
    mods = model.moe.modulation(model.dense.condition(torch.tensor([*labels, 5, 5, 5]))).blocks
    for routed, (x_BLC, _, normed_BLC) in zip(scores.seen, scores.inputs, strict=True):
        rows = 3 if cfg != 1.5 and routed.si == 3 else 6
        _, _, _, gain, _, shift = mods[routed.layer][:rows].unbind(2)
        assert_close(x_BLC, normed_BLC * gain + shift, rtol=0, atol=1e-12)
        router = routed.ffn.router
        expected_BLE = torch.stack(
            [
                by_hand(router, normed_LC, routed.si, label)
                for normed_LC, label in zip(normed_BLC, [*labels, 5, 5, 5][:rows], strict=True)
            ][: 3 if share_mask else rows]
        )
        assert_close(routed.scores_bLE, expected_BLE, rtol=0, atol=1e-12)


def test_teacher_forcing_tells_the_same_as_training(model, make_teacher):
    """Scale by scale over a cache as all at once, and another class changes the scores."""
    teacher, labels = make_teacher(model.moe), [2, 5]
    alone, scores = DynamicVAR(model.moe, model.moe, range(4)), Scores(model)
    alone_scores = Scores(alone)
    alone(labels, teacher, tau=0.0, observer=alone_scores)
    model.moe(labels, teacher)
    for layer, (_, _, normed_BLC) in enumerate(scores.inputs):
        ffn = model.moe.blocks[layer].ffn
        all_BLE = ffn.router(
            normed_BLC, Context(normed_BLC, model.moe.lvl_1L[0], torch.tensor(labels))
        )
        parts = [r.scores_bLE for r in alone_scores.seen if r.layer == layer]
        assert_close(torch.cat(parts, dim=1), all_BLE, rtol=0, atol=1e-9)


def test_without_a_condition_nothing_is_there(make_var, make_moe):
    moe = make_moe(make_var(seed=1, activation="relu"))
    assert informed(moe, "none") is moe
    assert [name for name in moe.state_dict() if "embed_" in name.split("router.")[-1]] == []
    told = informed(moe, "both")
    added = {
        f"blocks.{i}.ffn.router.{name}": shape
        for i in range(2)
        for name, shape in (("scale_embed_SR", (4, 8)), ("class_embed_KR", (6, 8)))
    }
    state = told.state_dict()
    assert {n: tuple(state[n].shape) for n in state.keys() - moe.state_dict().keys()} == added
    x_BLC = torch.randn(2, 3, 64)
    plain, router = moe.blocks[1].ffn.router, told.blocks[1].ffn.router
    context = Context(x_BLC, 2, torch.tensor([0, 5]))
    with torch.no_grad():  # vectors start at 0
        assert_close(router(x_BLC, context), plain(x_BLC))


def test_it_costs_no_multiply_add(model, make_var, make_moe, make_vqvae):
    plain = DynamicVAR(model.dense, make_moe(make_var(seed=1, activation="relu")).double(), SCALES)
    told, untold = (
        count_flops(each, make_vqvae().double(), [1, 4], tau=0.0) for each in (model, plain)
    )
    assert told.by_part_and_scale_gmac == untold.by_part_and_scale_gmac


def test_files_say_it_and_are_loaded_strictly(model, tmp_path, make_teacher):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    loaded, given = DynamicVAR.from_pretrained(folder), ([2, 5], make_teacher(model.moe))
    assert torch.equal(loaded(*given, tau=0.6), model(*given, tau=0.6))
    content = json.loads((folder / "config.json").read_text())
    experts = content["config"]["moe"]["experts"]
    assert experts.pop("router_condition") == model.moe.config.experts.router_condition
    # Without the field it is a file from before there were conditions
    (folder / "config.json").write_text(json.dumps(content))
    assert_refused(DynamicVAR.from_pretrained, folder, "unexpected", "_embed_")
    weights = folder / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        about = file.metadata()
    tensors = {name: t for name, t in load_file(weights).items() if "_embed_" not in name}
    save_file(tensors, weights, about)
    assert DynamicVAR.from_pretrained(folder).moe.config.experts.router_condition == "none"


def test_the_published_router_is_as_it_was():
    assert [name for name, _ in Router(16, 6, 5).named_parameters()] == ["fc1.weight", "fc2.weight"]
