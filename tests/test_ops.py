"""Products and convolutions in bfloat16, against float64 of the same values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmoe_var import ops
from dmoe_var.ops import (
    FEW_ROWS,
    Conv2d,
    Linear,
    activated_linear,
    linear,
    unrounded_linear,
)
from dmoe_var.sampling_time import sampling

HALF_ULP = 2.0**-8
"""Largest relative error of one rounding to bfloat16 (7 stored bits)."""
HALF_ULP_32 = 2.0**-24
"""Largest relative error of one rounding to float32."""


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request, monkeypatch):
    monkeypatch.setattr(ops, "EMULATES_BFLOAT16", request.param)
    return request.param


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact_linear(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def assert_rounded_once(found, exact, magnitude, terms):
    """Sums of so many terms in float32, in any order, rounded to bfloat16 at the end. magnitude:
    the sums of the terms' absolute values."""
    summing = terms * HALF_ULP_32 * magnitude
    error = (found.double() - exact).abs()
    assert (error <= HALF_ULP * (exact.abs() + summing) + summing).all()


CONV = {
    "plain": ({"kernel_size": 3, "padding": 1}, (3, 6, 7, 7)),
    "strided": ({"kernel_size": 3, "stride": 2, "bias": False}, (3, 6, 8, 8)),
    "by one pixel": ({"kernel_size": 1}, (1, 6, 2, 2)),
}


def conv(fields):
    torch.manual_seed(0)
    return Conv2d(6, 5, **fields)


@torch.no_grad()
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(FEW_ROWS, 96), (FEW_ROWS + 1, 96), (2, 40, 96), (1, 96)])
def test_linear_is_exact_to_bfloat16(emulated, shape, with_bias):
    x, weight = random(*shape), random(33, 96, seed=1)
    bias = random(33, seed=2) if with_bias else None
    exact = exact_linear(x, weight, bias)
    found = linear(x, weight, bias)
    assert (found.dtype, found.shape) == (torch.bfloat16, (*shape[:-1], 33))
    if not emulated or x[..., 0].numel() <= FEW_ROWS:
        assert torch.equal(found, F.linear(x, weight, bias))
        return
    rounded = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert torch.equal(found, rounded.bfloat16())
    largest = exact_linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert_rounded_once(found, exact, largest, terms=97)


@torch.no_grad()
@pytest.mark.parametrize("name", CONV)
def test_convolution_is_exact_to_bfloat16(emulated, name):
    fields, shape = CONV[name]
    ours, x = conv(fields).bfloat16(), random(*shape)
    theirs = torch.nn.Conv2d(6, 5, **fields).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    found = ours(x)
    assert found.dtype == torch.bfloat16
    if not emulated:
        assert torch.equal(found, theirs(x))
        return
    exact_conv = torch.nn.Conv2d(6, 5, **fields).double()
    exact_conv.load_state_dict(ours.state_dict())
    exact = exact_conv(x.double())
    for parameter in exact_conv.parameters():
        parameter.abs_()
    assert_rounded_once(found, exact, exact_conv(x.double().abs()), terms=6 * 9 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_are_torchs_own(emulated, dtype):
    """Bitwise, gradients too."""
    x = random(2, 40, 96).to(dtype).requires_grad_()
    images = random(3, 6, 7, 7).to(dtype).requires_grad_()
    torch.manual_seed(0)
    ours = Linear(96, 33).to(dtype), conv(CONV["plain"][0]).to(dtype)
    torch_conv = torch.nn.Conv2d(6, 5, **CONV["plain"][0])
    theirs = torch.nn.Linear(96, 33).to(dtype), torch_conv.to(dtype)
    for our, their, given in zip(ours, theirs, (x, images), strict=True):
        their.load_state_dict(our.state_dict())
        out, expected = our(given), their(given)
        assert torch.equal(out, expected)
        gradients = [
            torch.autograd.grad(o.square().sum(), (given, *m.parameters()))
            for o, m in ((out, our), (expected, their))
        ]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def gradients(layer, x, ahead):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x), (x, *layer.parameters()), ahead)


def test_gradients_in_bfloat16(emulated):
    """Of the linear layer and the convolution: torch's own, or sums in float32 rounded once."""
    for ours, plain, shape, most_terms in (
        (Linear(96, 33), nn.Linear(96, 33), (2, 40, 96), 96),
        (conv(CONV["plain"][0]), nn.Conv2d(6, 5, **CONV["plain"][0]), (3, 6, 7, 7), 3 * 49),
    ):
        ours.bfloat16()
        plain.load_state_dict(ours.state_dict())
        plain.bfloat16()
        x = random(*shape)
        ahead = random(*ours(x).shape, seed=3)
        found = gradients(ours, x, ahead)
        assert {each.dtype for each in found} == {torch.bfloat16}
        if not emulated:
            assert all(map(torch.equal, found, gradients(plain, x, ahead)))
            continue
        plain.double()
        exact = gradients(plain, x.double(), ahead.double())
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.abs_()
        magnitudes = gradients(plain, x.double().abs(), ahead.double().abs())
        for each, wanted, magnitude in zip(found, exact, magnitudes, strict=True):
            assert_rounded_once(each, wanted, magnitude, most_terms)


@pytest.mark.parametrize(
    ("machine", "bf16", "amx", "emulates"),
    [
        ("AMD64", False, False, True),
        ("x86_64", True, False, False),
        ("x86_64", False, True, False),
        ("arm64", False, False, False),
    ],
)
def test_which_processors_emulate(monkeypatch, machine, bf16, amx, emulates):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert ops.emulates_bfloat16() == emulates


ACTIVATIONS = [nn.GELU(approximate="tanh"), nn.GELU(), nn.ReLU(), nn.SiLU()]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_sampling_products_against_float64(act, with_bias, libraries):
    """Also of what does not lie in one piece."""
    x, weight = torch.randn(2, 5, 66)[..., ::2], torch.randn(33, 65).T
    bias = torch.randn(65) if with_bias else None
    wide = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with sampling():
        assert torch.allclose(linear(x, weight, bias).double(), wide, atol=1e-4)
        assert torch.allclose(linear(x, weight, bias, ragged=True).double(), wide, atol=1e-4)
        activated = activated_linear(act, x, weight, bias)
    assert torch.allclose(activated.double(), act(wide), atol=1e-4)


def test_a_hook_on_the_activation_sees_it(libraries):
    act, seen = nn.ReLU(), []
    act.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with sampling():
        activated_linear(act, torch.randn(3, 8), torch.randn(4, 8), None)
    assert len(seen) == 1


def test_who_counts_operators_sees_the_common_ones(libraries):
    with sampling(), FlopCounterMode(display=False) as counter:
        activated_linear(nn.ReLU(), torch.randn(3, 8), torch.randn(4, 8), torch.randn(4))
    assert counter.get_total_flops() == 2 * 3 * 8 * 4


def test_products_go_to_onednn_while_images_are_drawn_alone(monkeypatch):
    """On this thread, where nobody asks for a gradient, if they are not small."""
    monkeypatch.setattr(ops, "has_onednn", lambda: True)
    monkeypatch.setattr(ops, "SMALL", 95)
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        assert not ops._by_onednn(x, weight)
        with sampling():
            assert ops._by_onednn(x, weight)
            assert not ops._by_onednn(x, weight[:3])
            assert not pool.submit(ops._by_onednn, x, weight).result()
            with torch.enable_grad():
                assert not ops._by_onednn(x, weight)
        assert not ops._by_onednn(x, weight)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(approximate="tanh"), nn.GELU()], ids=str)
def test_cublas_takes_bias_and_activation_too(act, monkeypatch):
    """As a GPU's tensors would go, here on the CPU, whose operator has GELU by erf; there torch is
    left to compute that."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(ops, "has_onednn", lambda: False)
    layer, x = Linear(8, 4), torch.randn(2, 3, 8)
    fused = []
    one = torch._addmm_activation
    monkeypatch.setattr(
        torch, "_addmm_activation", lambda *a, **k: fused.append(None) or one(*a, **k)
    )
    with torch.no_grad():
        exact = act(exact_linear(x, layer.weight, layer.bias))
        plain = ops.activated(act, layer, x)
    assert not fused
    with sampling():
        found = ops.activated(act, layer, x), activated_linear(act, x, layer.weight, layer.bias)
        assert len(fused) == (0 if getattr(act, "approximate", None) == "none" else 2)
        hook = act.register_forward_hook(lambda *_: None)
        ops.activated(act, layer, x)
        hook.remove()
        assert len(fused) in (0, 2)
    for out in (plain, *found):
        by_erf = len(fused) == 2 and isinstance(act, nn.GELU) and out is not plain
        atol = 1e-3 if by_erf else 1e-6
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_unrounded_product(dtype):
    x, weight = torch.randn(2, 40, 96).to(dtype), torch.randn(33, 96).to(dtype)
    exact, magnitude = exact_linear(x, weight, None), exact_linear(x.abs(), weight.abs(), None)
    found = unrounded_linear(x, weight)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((found.double() - exact).abs() <= 96 * HALF_ULP_32 * magnitude).all()
