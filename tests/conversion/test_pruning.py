"""Pruned-FFN: which neurons go, and that what is left is the FFN without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import VARConfig
from dmoe_var.conversion import pruning
from dmoe_var.conversion.pruning import kept_neurons, mean_activations, prune

SCALES = (1, 3)


def inputs(var, make_teacher, batch=4):
    return torch.arange(batch) % var.config.num_classes, make_teacher(var, batch)


@torch.no_grad()
def hidden_activations(var, labels, teacher, scales):
    """Of each layer (tokens, H): from what enters the FFN, with the weights applied anew."""
    entered = {}
    hooks = [
        block.ffn.register_forward_pre_hook(lambda _, args, i=i: entered.setdefault(i, args[0]))
        for i, block in enumerate(var.blocks)
    ]
    var(labels, teacher)
    for hook in hooks:
        hook.remove()
    starts = [sum(p * p for p in var.config.patch_nums[:si]) for si in scales]
    tokens = [t + i for si, t in zip(scales, starts, strict=True)
              for i in range(var.config.patch_nums[si] ** 2)]  # fmt: skip
    act = {"relu": torch.relu, "gelu": torch.nn.GELU(approximate="tanh")}[var.config.activation]
    return [
        act(entered[i][:, tokens] @ block.ffn.fc1.weight.T + block.ffn.fc1.bias).flatten(0, 1)
        for i, block in enumerate(var.blocks)
    ]


@pytest.mark.parametrize(("act", "signed"), [("relu", False), ("gelu", False), ("gelu", True)])
def test_means_are_over_tokens_of_the_scales_and_both_branches(make_var, make_teacher, act, signed):
    var = make_var(activation=act).double()
    labels, teacher = inputs(var, make_teacher)
    null = torch.full_like(labels, var.config.num_classes)
    branches = [hidden_activations(var, each, teacher, SCALES) for each in (labels, null)]
    expected = map(torch.cat, zip(*branches, strict=True))
    batches = [(labels[:3], teacher[:3]), (labels[3:], teacher[3:])]

    means = mean_activations(var, batches, SCALES, signed)

    for found, a_NH in zip(means, expected, strict=True):
        assert found.dtype == torch.float64
        assert_close(found, (a_NH if signed else a_NH.abs()).mean(0), rtol=1e-12, atol=1e-12)


def test_training_mode_changes_no_mean_and_no_hook_is_left(make_var, make_teacher):
    var = make_var(drop_path=0.5, label_drop=0.5)
    batches = [inputs(var, make_teacher)]
    expected = mean_activations(var, batches, SCALES)
    again = mean_activations(var.train(), batches, SCALES)
    assert all(map(torch.equal, again, expected))
    assert var.training
    assert not any(block.ffn.act._forward_hooks for block in var.blocks)


def test_processes_add_up_sums_and_tokens(make_var, make_teacher, monkeypatch):
    """Each gives the images it has: here another one has the rest."""
    var = make_var().double()
    labels, teacher = inputs(var, make_teacher)
    expected = mean_activations(var, [(labels, teacher)], SCALES)
    halves = []
    monkeypatch.setattr(pruning, "sum_over_processes", lambda ts: halves.append([*ts]))
    for rows in (slice(0, 1), slice(1, None)):
        mean_activations(var, [(labels[rows], teacher[rows])], SCALES)

    def add_the_other(tensors):
        for mine, theirs in zip(tensors, halves[1], strict=True):
            mine += theirs

    monkeypatch.setattr(pruning, "sum_over_processes", add_the_other)
    found = mean_activations(var, [(labels[:1], teacher[:1])], SCALES)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("share", "dropped"), [(0, 0), (0.1, 3), (0.3, 11), (0.7, 25), (1 - 2**-53, 36)]
)
@pytest.mark.parametrize("num_values", [3, 10**6], ids=["ties", "no ties"])
def test_neurons_of_lowest_mean_go(share, dropped, num_values):
    generator = torch.Generator().manual_seed(0)
    means = torch.randint(num_values, (37,), generator=generator).double() - 1
    order = sorted(range(37), key=lambda h: (means[h].item(), h))
    assert kept_neurons(means, share).tolist() == sorted(order[dropped:])


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_another_share_raises(share):
    with pytest.raises(ValueError, match=r"^share=(.* is not within \[0, 1\)|nan must be finite)$"):
        kept_neurons(torch.ones(4), share)


@torch.no_grad()
def test_the_rules_differ(make_var, make_teacher):
    """Neuron 5 is always at gelu(-0.75), which is -0.17, neuron 9 at 0.05; the others at 5."""
    var = make_var().double()
    for block in var.blocks:
        block.ffn.fc1.weight.zero_()
        block.ffn.fc1.bias.fill_(5)
        block.ffn.fc1.bias[5], block.ffn.fc1.bias[9] = -0.75, 0.0925
    hidden, batches = var.config.hidden, [inputs(var, make_teacher)]
    for signed, dropped in ((False, 9), (True, 5)):
        for means_H in mean_activations(var, batches, (3,), signed):
            kept = kept_neurons(means_H, 1 / hidden)
            assert kept.tolist() == [h for h in range(hidden) if h != dropped]


@torch.no_grad()
@pytest.mark.parametrize(("act", "share"), [("gelu", 0), ("gelu", 0.3), ("relu", 0.999)])
def test_a_pruned_model_is_the_dense_one_with_activations_zeroed(
    make_var, make_teacher, head_inputs, act, share
):
    var = make_var(activation=act).double()
    given = inputs(var, make_teacher)
    means = mean_activations(var, [given], SCALES)
    pruned = prune(var, share, means)

    masks = [torch.zeros(var.config.hidden, dtype=torch.bool) for _ in means]
    for mask, means_H in zip(masks, means, strict=True):
        mask[means_H.argsort()[int(var.config.hidden * share) :]] = True
    with head_inputs(var, pruned) as seen:
        dense = var(*given)
        pruned(*given)
        for block, mask in zip(var.blocks, masks, strict=True):
            block.ffn.act.register_forward_hook(lambda _, __, a, mask=mask: a * mask)
        zeroed = var(*given)
    plain, found, expected = seen
    assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(zeroed, dense) == torch.equal(expected, plain) == (share == 0)
    assert pruned.config.hidden == int(masks[0].sum())
    assert pruned.blocks[0].ffn.fc1.weight.shape == (pruned.config.hidden, var.config.C)
    assert sum(p.numel() for p in var.parameters()) - sum(
        p.numel() for p in pruned.parameters()
    ) == sum((~mask).sum() * (2 * var.config.C + 1) for mask in masks)


def test_the_dense_model_is_left_as_it_is_and_shares_the_rest(make_var):
    var = make_var().train()
    before = {name: tensor.clone() for name, tensor in var.state_dict().items()}
    pruned = prune(var, 0.5, [torch.rand(var.config.hidden) for _ in var.blocks])
    assert pruned.training
    theirs = pruned.state_dict()
    for name, tensor in var.state_dict().items():
        assert torch.equal(tensor, before[name])
        pruned_ffn = ".ffn.fc1." in name or name.endswith(".ffn.fc2.weight")
        assert (theirs[name].data_ptr() == tensor.data_ptr()) != pruned_ffn, name


def test_every_whole_hidden_width_is_exact():
    """mlp_ratio is all that a configuration holds of it."""
    for width in (7, 64, 1920):
        config = VARConfig(depth=1, width=width, num_heads=1)
        for hidden in range(1, 4 * width + 1, max(1, width // 60)):
            assert replace(config, mlp_ratio=hidden / width).hidden == hidden


def test_what_cannot_be_pruned_raises(make_var, make_moe, make_teacher):
    var = make_var()
    moe, means = make_moe(var), [torch.ones(var.config.hidden) for _ in var.blocks]
    for call in (
        lambda: prune(moe, 0.5, means),
        lambda: mean_activations(moe, [inputs(var, make_teacher)], SCALES),
    ):
        with pytest.raises(ValueError, match="the model has experts already"):
            call()
    for wrong in (means[:1], [torch.ones(7)] * 2):
        with pytest.raises(ValueError, match="one for each neuron of each layer"):
            prune(var, 0.5, wrong)
    with pytest.raises(ValueError, match="at least one token"):
        mean_activations(var, [], SCALES)
