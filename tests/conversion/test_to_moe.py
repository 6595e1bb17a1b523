"""The split keeps the ReLU model's function, whatever neuron goes to whatever expert."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import All, Threshold, convert_to_moe
from dmoe_var.conversion.to_moe import cluster_layer, fill_experts
from dmoe_var.models.blocks import FFN
from dmoe_var.moe.layer import ExpertConfig, MoEFFN
from dmoe_var.moe.routing import Routing

C, H = 16, 48
ALL_ON = [None, Routing(All()), *(Routing(Threshold(0), impl=i) for i in ("grouped", "reference"))]


def random_labels(num_neurons, expert_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_neurons, generator=generator) // expert_size


def split_ffn(act="relu", expert_size=8):
    """An FFN with biases in float64, and its experts under random labels."""
    torch.manual_seed(0)
    ffn = FFN(C, H, act).double()
    experts = MoEFFN(C, H, act, ExpertConfig(expert_size)).double()
    labels = random_labels(H, expert_size, seed=0)
    fill_experts(experts, ffn, labels)
    return ffn, experts, labels


@torch.no_grad()
@pytest.mark.parametrize("routing", ALL_ON, ids=str)
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_every_expert_on_is_the_ffn(routing, act):
    for expert_size in (1, 8, H):
        ffn, experts, _ = split_ffn(act, expert_size)
        x_BLC = torch.randn(2, 7, C, dtype=torch.float64)
        expected = ffn(x_BLC)
        assert (experts(x_BLC, routing) - expected).norm() <= 1e-12 * expected.norm()


@torch.no_grad()
def test_neurons_go_where_the_labels_say():
    ffn, experts, labels = split_ffn()
    x_BLC = torch.randn(1, 3, C, dtype=torch.float64)
    h_BLH = ffn.fc1(x_BLC).clamp_min(0)
    norms = experts.true_norms(x_BLC)
    for e in range(H // 8):
        output = (h_BLH * (labels == e)) @ ffn.fc2.weight.T
        assert_close(norms[..., e], output.norm(dim=-1), rtol=0, atol=1e-12)
    assert torch.equal(experts.b2_C, ffn.fc2.bias)


@torch.no_grad()
def test_split_model_is_the_relu_model(make_var, make_teacher, head_inputs):
    var = make_var(activation="relu").double()
    labels = [random_labels(var.config.hidden, 16, seed) for seed in range(2)]
    moe = convert_to_moe(var, 16, labels=labels)
    assert (moe.config.experts.expert_size, moe.config.activation) == (16, "relu")
    inputs = torch.tensor([0, 5]), make_teacher(var)
    with head_inputs(var, moe) as seen:
        var(*inputs), moe(*inputs)
    assert_close(seen[1], seen[0], rtol=0, atol=1e-12)
    ours, theirs = moe.state_dict(), var.state_dict()
    assert {k for k in theirs if ".ffn." not in k} == {k for k in ours if ".ffn." not in k}
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if ".ffn." not in k)


def test_the_split_is_a_copy_and_leaves_the_global_generator_alone(make_var):
    var = make_var().train()
    before, state = {k: t.clone() for k, t in var.state_dict().items()}, torch.get_rng_state()
    labels = [random_labels(256, 128, seed=0)] * 2
    moe = convert_to_moe(var, router_hidden=5, labels=labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert moe.training
    assert moe.blocks[0].ffn.router.fc1.weight.shape == (5, 64)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[k]) for k, t in var.state_dict().items())


def test_layers_are_clustered_one_by_one(make_var):
    """As the whole model is: whoever clusters a layer, its experts are the same. The seed decides,
    of the routers too."""
    var = make_var()
    labels = [cluster_layer(var, layer, 64, seed=1) for layer in (1, 0)][::-1]
    assert not torch.equal(labels[0], labels[1])
    ours = convert_to_moe(var, 64, seed=1, labels=labels).state_dict()
    theirs = convert_to_moe(var, 64, seed=1).state_dict()
    assert all(torch.equal(ours[k], t) for k, t in theirs.items())
    other = convert_to_moe(var, 64, seed=2, labels=labels).state_dict()
    router = "blocks.0.ffn.router.fc1.weight"
    assert not torch.equal(ours[router], other[router])


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(H, dtype=torch.long),
        torch.arange(H) // 8 - 1,
        torch.arange(H - 8) // 8,
    ],
    ids=["one expert", "negative", "neurons left over"],
)
def test_labels_that_are_no_balanced_split_raise(labels):
    ffn, experts = FFN(C, H, "relu"), MoEFFN(C, H, "relu", ExpertConfig(8))
    with pytest.raises(ValueError, match="not 8 each"):
        fill_experts(experts, ffn, labels)


def test_a_size_that_does_not_divide_raises(make_var):
    with pytest.raises(ValueError, match="expert_size=100 does not divide"):
        convert_to_moe(make_var(), 100)


def test_labels_of_too_few_layers_raise(make_var):
    with pytest.raises(ValueError, match="labels"):
        convert_to_moe(make_var(), 64, labels=[random_labels(256, 64, 0)])


def test_a_split_model_cannot_be_split(make_var, make_moe):
    moe, labels = make_moe(make_var()), [random_labels(256, 64, 0)] * 2
    for given in (None, labels):
        with pytest.raises(ValueError, match="has experts already"):
            convert_to_moe(moe, 64, labels=given)
