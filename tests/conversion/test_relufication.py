"""ReLUfication changes the activation and nothing else."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.conversion.relufication import relufy


def test_only_the_activation_differs(make_var):
    var = make_var()
    relu = relufy(var)
    assert asdict(relu.config) == asdict(var.config) | {"activation": "relu"}
    assert var.config.activation == "gelu"
    assert_close(relu.state_dict(), var.state_dict(), rtol=0, atol=0)


def test_the_ffn_is_fc2_of_relu_of_fc1(make_var):
    x = torch.randn(2, 3, 64)
    for block in relufy(make_var()).blocks:
        ffn = block.ffn
        hidden = (x @ ffn.fc1.weight.T + ffn.fc1.bias).clamp_min(0)
        assert_close(ffn(x), hidden @ ffn.fc2.weight.T + ffn.fc2.bias)


@pytest.mark.parametrize("training", [False, True])
def test_mode_and_dtype_are_kept(make_var, training):
    relu = relufy(make_var().double().train(training))
    assert relu.training == training
    assert {p.dtype for p in relu.parameters()} == {torch.float64}


def test_it_is_a_copy(make_var):
    var = make_var()
    before = var.head.weight.clone()
    with torch.no_grad():
        relufy(var).head.weight.zero_()
    assert torch.equal(var.head.weight, before)
