"""Plans, and that whatever runs a model runs its plan."""

from __future__ import annotations

import pytest
import torch

from dmoe_var import DynamicVAR, generate
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.models.blocks import SelfAttention
from dmoe_var.models.var import VAR

LABELS = [1, 4]


@pytest.mark.parametrize("branches", [1, 2])
def test_a_step_a_scale(make_var, branches):
    """Every token once, in order; AdaLN once a backbone; one cache."""
    dense = make_var()
    model = DynamicVAR(dense, make_var(seed=1, activation="relu"), (1, 3))
    plan = model.plan((branches,) * 4)
    assert [step.si for step in plan] == [0, 1, 2, 3]
    names = {id(model.dense): "dense", id(model.moe): "moe"}
    assert [names[id(step.backbone)] for step in plan] == ["dense", "moe", "dense", "moe"]
    assert [step.projects for step in plan] == [True, True, False, False]
    assert [step.tokens for step in plan] == [slice(0, 1), slice(1, 5), slice(5, 14), slice(14, 30)]
    assert {step.branches for step in plan} == {branches}
    assert all(step.cache is model.dense for step in plan)
    assert all(step.projects for step in model.plan((branches,) * 4, adaln_every_scale=True))
    alone = dense.plan((branches,) * 4)
    assert all(step.backbone is step.cache is dense for step in alone)
    assert [step.projects for step in alone] == [True, False, False, False]


def test_projections_of_the_same_weights_are_computed_once(make_var, make_vqvae, make_moe):
    """Where FFNs alone were fine-tuned; images and all else stay what they are."""
    dense, vqvae = make_var(), make_vqvae()
    model = DynamicVAR(dense, make_moe(dense), (1, 3))
    assert [step.projects for step in model.plan()] == [True, False, False, False]
    assert all(step.projects for step in model.plan(adaln_every_scale=True))
    assert {id(step.projector) for step in model.plan()} == {id(model.dense)}
    expected = generate(model, vqvae, LABELS, adaln_every_scale=True)
    assert torch.equal(generate(model, vqvae, LABELS), expected)
    assert len({sum(fixed_cost(each, vqvae).macs["adaln"]) for each in (model, dense)}) == 1
    model.moe.blocks[0].ada_lin.register_forward_hook(lambda *_: None)  # which has to be called
    assert [step.projects for step in model.plan()] == [True, True, False, False]
    model.moe.blocks[0].ada_lin._forward_hooks.clear()
    half = model.to(torch.bfloat16)
    assert [step.projects for step in half.plan()] == [True, False, False, False]


def test_nothing_is_computed_anew_at_each_scale(make_var, make_vqvae, monkeypatch):
    """What attention adds to all tokens is computed once for each block of each backbone; images
    stay what they are where each call of attention computes it, with temperatures above the cap."""
    dense, vqvae = make_var(), make_vqvae()
    model = DynamicVAR(dense, make_var(seed=1, activation="relu"), (1, 3))
    with torch.no_grad():
        for block in (*model.dense.blocks, *model.moe.blocks):
            block.attn.scale_mul_1H11.copy_(torch.tensor([2.0, 9.0]).view(1, 2, 1, 1))
            block.attn.q_bias.fill_(0.25)
    computed, vectors = [], SelfAttention.vectors
    monkeypatch.setattr(
        SelfAttention, "vectors", lambda self: computed.append(self) or vectors(self)
    )
    expected = generate(model, vqvae, LABELS)
    blocks = [*model.dense.blocks, *model.moe.blocks]
    assert {id(each) for each in computed} == {id(block.attn) for block in blocks}
    assert len(computed) == len(blocks)
    monkeypatch.setattr(VAR, "attention_vectors", lambda self: [None] * len(self.blocks))
    assert torch.equal(generate(model, vqvae, LABELS), expected)
    assert len(computed) == len(blocks) + 4 * len(model.dense.blocks)


def test_rows_by_scale(make_var):
    assert [step.branches for step in make_var().plan((2, 2, 1, 1))] == [2, 2, 1, 1]


def test_everything_runs_the_plan(make_var, make_vqvae, make_teacher, monkeypatch):
    """A model with the plan of another does, and costs, what that one does."""
    shape = {"patch_nums": (1, 2), "depth": 1}
    vqvae, dense = make_vqvae(patch_nums=(1, 2)), make_var(**shape)
    relu, teacher = make_var(seed=1, activation="relu", **shape), make_teacher(dense)
    model, other = (DynamicVAR(dense, relu, scales) for scales in ((1,), (0, 1)))
    found = [runs(each, vqvae, teacher) for each in (model, other)]
    assert not any(same(*pair) for pair in zip(*found, strict=True))
    monkeypatch.setattr(model, "plan", other.plan)
    assert all(same(*pair) for pair in zip(runs(model, vqvae, teacher), found[1], strict=True))


def runs(model, vqvae, teacher):
    """Images, teacher-forced logits, and at which scales AdaLN costs something."""
    images = generate(model, vqvae, LABELS, top_k=9)
    return images, model(LABELS, teacher), fixed_cost(model, vqvae).macs["adaln"]


def same(a, b):
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
