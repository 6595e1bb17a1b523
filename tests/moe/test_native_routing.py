"""Router and threshold by compiled code: the values of torch's."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dmoe_var.errors import InputError
from dmoe_var.moe.experts import native
from dmoe_var.moe.router import Router
from dmoe_var.moe.selection import Threshold

pytestmark = pytest.mark.skipif(native.kernel() is None, reason="no C compiler here")
DTYPES = [torch.float32, torch.bfloat16]
# tokens N, C width, R hidden, E experts
SIZES = [
    (1, 1, 1, 1),
    (7, 12, 5, 3),
    (9, 33, 16, 16),
    (65, 96, 64, 40),
    (100, 64, 128, 33),
    (257, 130, 40, 128),
]


@pytest.fixture
def off(monkeypatch):
    """off(function) -> what torch makes of it."""

    def off(function):
        with monkeypatch.context() as patch:
            patch.setenv(native.SWITCH, "0")
            return function()

    return off


def made(C, R, E, dtype=torch.float32):
    torch.manual_seed(0)
    return Router(C, R, E).requires_grad_(False).to(dtype)


@pytest.fixture(params=["widened", "dot products"])
def products(request, monkeypatch):
    """The ways to multiply bfloat16, as far as the processor knows them."""
    dots = request.param == "dot products"
    if dots and not native.kernel().dots:
        pytest.skip("this processor has no dot products of bfloat16")
    monkeypatch.setattr(native.kernel(), "dots", dots)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_scores_are_those_of_torch(sizes, dtype, precision, off):
    """In bfloat16 they are rounded as often; float32 is compared with float64."""
    N, C, R, E = sizes
    router, x = made(C, R, E, dtype), 3 * torch.randn(N, C).to(dtype)
    assert native.knows(x, router.fc1.weight, router.fc2.weight)
    found, wide = router(x), copy.deepcopy(router)
    if dtype == torch.float32:
        x, wide = x.double(), wide.double()
    expected = off(lambda: wide(x)).double()
    assert found.dtype == dtype
    assert (found - expected).norm() <= precision * expected.norm()


def test_gelu_everywhere(off):
    """Of one neuron, from far below zero to far above."""
    router = made(1, 1, 1)
    for layer in (router.fc1, router.fc2):
        layer.weight.fill_(1)
    x = torch.linspace(-12, 12, 4801)[:, None]
    expected = (x.double() / 2 * (1 + torch.erf(x.double() / math.sqrt(2)))).abs()
    torch.testing.assert_close(router(x).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1e-9, 0.1, 1 / 3, 0.5, 1.0])
def test_the_mask_is_torch_s(off, dtype, tau):
    """Exactly: where scores are equal, where all are 0, and where a product has to be rounded."""
    scores = torch.rand(600, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[3] = 0
    scores[4] = scores[4, 0]
    scores[5, 1:] = scores[5, :1] * tau
    scores[6] *= -1
    assert native.knows(scores)
    found = Threshold(tau)(scores)
    assert torch.equal(found, off(lambda: Threshold(tau)(scores)))
    assert found.dtype == torch.bool
    wide = scores.view(2, 300, 70)[:, :, ::2]
    assert torch.equal(Threshold(tau)(wide), off(lambda: Threshold(tau)(wide)))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_are_not_finite(dtype, value):
    scores = torch.rand(20, 7).to(dtype)
    scores[11, 5] = value
    with pytest.raises(InputError, match="an expert's score is not finite"):
        Threshold(0.5)(scores)


def test_no_tokens():
    assert made(12, 5, 3)(torch.zeros(0, 12)).shape == (0, 3)
    assert Threshold(0.5)(torch.zeros(2, 0, 3)).shape == (2, 0, 3)


def test_packed_weights_follow_the_router(off):
    router, x = made(12, 5, 3), torch.randn(9, 12)
    before = router(x)
    router.fc2.weight.mul_(2)
    torch.testing.assert_close(router(x), 2 * before)
    other = copy.deepcopy(router)
    other.fc1.weight.neg_()
    torch.testing.assert_close(other(x), off(lambda: other(x)))
    router.to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(router(x), off(lambda: router(x)))


def test_gradients_and_hooks_are_torch_s():
    router, x = made(12, 5, 3), torch.randn(9, 12)
    router.requires_grad_(True)
    router(x).sum().backward()
    assert router.fc1.weight.grad.abs().sum() > 0
    seen = []
    router.fc1.register_forward_hook(lambda *given: seen.append(given))
    with torch.no_grad():
        router(x)
    assert seen
