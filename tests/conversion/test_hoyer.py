"""Hoyer's measure in closed form and by loops; activations as recorded from the model."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.conversion.hoyer import (
    hoyer,
    hoyer_loss,
    inactive_share,
    record_activations,
    shifted_pre_activation,
)

H = 12


def random_activations(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).clamp_min(0)


def naive_hoyer(a_BLH):
    values = []
    for row in a_BLH.flatten(0, 1).tolist():
        values.append(sum(map(abs, row)) ** 2 / (sum(v * v for v in row) + 1e-15))
    return torch.tensor(sum(values) / len(values), dtype=torch.float64)


@pytest.mark.parametrize("active", [0, 1, 5, H])
@pytest.mark.parametrize("value", [1e-3, 1.0, -50.0])
def test_equal_activations_count_the_active_neurons(active, value):
    a_BLH = torch.zeros(2, 3, H, dtype=torch.float64)
    a_BLH[..., :active] = value
    assert_close(hoyer(a_BLH).item(), float(active), rtol=1e-8, atol=0)


def test_mean_over_tokens_by_loops():
    a_BLH = random_activations(2, 5, H)
    assert_close(hoyer(a_BLH), naive_hoyer(a_BLH), rtol=1e-12, atol=0)
    assert_close(hoyer(7 * a_BLH), hoyer(a_BLH))


def test_loss_is_the_mean_over_layers_in_float32():
    layers = [random_activations(2, n, H).bfloat16() for n in (3, 5)]
    expected = (naive_hoyer(layers[0].double()) + naive_hoyer(layers[1].double())) / 2
    loss = hoyer_loss(layers)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_gradient_is_finite_for_a_silent_token():
    a_BLH = torch.zeros(1, 2, H).requires_grad_()
    hoyer_loss([a_BLH]).backward()
    assert a_BLH.grad.isfinite().all()


def test_shifted_pre_activation():
    z = torch.tensor([-30.0, -10.0, -9.5, 0.0, 4.0])
    assert shifted_pre_activation(z).tolist() == [0.0, 0.0, 0.5, 10.0, 14.0]


def test_inactive_share_counts_the_given_tokens():
    a_BLH = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [2.0, 3.0]]])
    shares = [inactive_share(a_BLH, s).item() for s in (slice(0, 1), slice(1, 3), slice(None))]
    assert shares == [0.5, 0.5, 0.5]
    assert inactive_share(a_BLH, slice(1, 2)).item() == 1.0


@torch.no_grad()
@pytest.mark.parametrize("pre_activation", [False, True])
def test_recorded_activations(make_var, make_teacher, pre_activation):
    var, entering = make_var(activation="relu"), []
    inputs = torch.tensor([1, 2]), make_teacher(var)
    for block in var.blocks:
        block.ffn.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with record_activations(var, pre_activation) as kept:
        var(*inputs)
    assert len(kept) == len(entering) == 2
    for block, x_BLC, found in zip(var.blocks, entering, kept, strict=True):
        z_BLH = x_BLC @ block.ffn.fc1.weight.T + block.ffn.fc1.bias
        assert_close(found, z_BLH if pre_activation else z_BLH.clamp_min(0), rtol=0, atol=1e-5)
    var(*inputs)
    assert len(kept) == 2


def test_recording_ends_with_an_error_too(make_var, make_teacher):
    var = make_var()
    with pytest.raises(ZeroDivisionError), record_activations(var) as kept:
        raise ZeroDivisionError
    var(torch.tensor([1, 2]), make_teacher(var))
    assert kept == []


def test_gradient_flows_through_recorded_activations(make_var, make_teacher):
    var = make_var(activation="relu")
    with record_activations(var) as kept:
        var(torch.tensor([1, 2]), make_teacher(var))
    hoyer_loss(kept).backward()
    assert all(block.ffn.fc1.weight.grad.any() for block in var.blocks)
