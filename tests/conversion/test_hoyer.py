"""Hoyer's measure in closed form and by loops; activations as the model shows them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.conversion.hoyer import ActivationProbe, hoyer, shifted_pre_activation

H = 12


def random_activations(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).clamp_min(0)


def naive_hoyer(a_BLH):
    values = [
        sum(map(abs, row)) ** 2 / (sum(v * v for v in row) + 1e-15)
        for row in a_BLH.flatten(0, 1).tolist()
    ]
    return torch.tensor(sum(values) / len(values), dtype=torch.float64)


@pytest.mark.parametrize(("active", "value"), [(0, 1.0), (1, -50.0), (5, 1e-3), (H, 1.0)])
def test_equal_activations_count_the_active_neurons(active, value):
    a_BLH = torch.zeros(2, 3, H, dtype=torch.float64)
    a_BLH[..., :active] = value
    assert_close(hoyer(a_BLH).item(), float(active), rtol=1e-8, atol=0)


def test_mean_over_tokens_by_loops():
    a_BLH = random_activations(2, 5, H)
    assert_close(hoyer(a_BLH), naive_hoyer(a_BLH), rtol=1e-12, atol=0)
    assert_close(hoyer(7 * a_BLH), hoyer(a_BLH))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_half_precisions_are_measured_in_float32(dtype, expected):
    a_BLH = random_activations(2, 5, H).to(dtype)
    assert hoyer(a_BLH).dtype == expected
    assert_close(hoyer(a_BLH).double(), naive_hoyer(a_BLH.double()), rtol=1e-6, atol=0)


def test_gradient_is_finite_for_a_silent_token():
    a_BLH = torch.zeros(1, 2, H).requires_grad_()
    hoyer(a_BLH).backward()
    assert a_BLH.grad.isfinite().all()


def test_shifted_pre_activation():
    z = torch.tensor([-30.0, -10.0, -9.5, 0.0, 4.0])
    assert shifted_pre_activation(z).tolist() == [0.0, 0.0, 0.5, 10.0, 14.0]


@torch.no_grad()
@pytest.mark.parametrize("pre_activation", [False, True])
def test_the_probe_shows_activations(make_var, make_teacher, pre_activation):
    """Layer by layer, as they are computed, until nobody looks. What `see` gives back, which a hook
    would put in the place of the activation, changes nothing."""
    var, entering, shown = make_var(activation="relu"), [], []
    inputs = torch.tensor([1, 2]), make_teacher(var)
    for block in var.blocks:
        block.ffn.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    probe = ActivationProbe(var, pre_activation)
    unseen = var(*inputs)
    assert shown == []
    entering.clear()
    probe.see = lambda layer, a_BLH: shown.append((layer, a_BLH)) or torch.zeros_like(a_BLH)
    assert torch.equal(var(*inputs), unseen)
    assert [layer for layer, _ in shown] == [0, 1]
    for block, x_BLC, (_, found) in zip(var.blocks, entering, shown, strict=True):
        z_BLH = x_BLC @ block.ffn.fc1.weight.T + block.ffn.fc1.bias
        assert_close(found, z_BLH if pre_activation else z_BLH.clamp_min(0), rtol=0, atol=1e-5)
    probe.see = None
    var(*inputs)
    assert len(shown) == 2
