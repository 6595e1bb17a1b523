"""The multi-scale quantiser against plain loops written from the paper, in float64."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dmoe_var.models.quantizer import MultiScaleQuantizer, Phi, nearest_tick

PATCH_NUMS = (1, 2, 3, 5)
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return MultiScaleQuantizer(16, 8, PATCH_NUMS, beta=0.3, num_phi=2).double()


@pytest.fixture
def f_BCHW():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, 5, 5, dtype=torch.float64, generator=generator)


def naive_codes(quantizer, residual_BCHW, si):
    """Tokens (B, p*p) of a residual and the map (B, C, H, W) that they add, by loops."""
    p, codes_VC = PATCH_NUMS[si], quantizer.embedding.weight
    z_BCpp = F.adaptive_avg_pool2d(residual_BCHW.detach(), p)
    tokens = torch.zeros(len(z_BCpp), p, p, dtype=torch.long)
    for b in range(len(z_BCpp)):
        for i in range(p):
            for j in range(p):
                distances = [(z_BCpp[b, :, i, j] - code).norm().item() for code in codes_VC]
                tokens[b, i, j] = distances.index(min(distances))
    h = codes_VC[tokens].permute(0, 3, 1, 2)
    if si < len(PATCH_NUMS) - 1:
        h = F.interpolate(h, size=PATCH_NUMS[-1], mode="bicubic")
    phi = quantizer.quant_resi.qresi_ls[0 if si < 2 else 1]
    h = 0.5 * h + 0.5 * F.conv2d(h, phi.weight, phi.bias, padding=1)
    return tokens.flatten(1), h


def naive_quantise(quantizer, f_BCHW):
    """Tokens, f_hat after each scale, and the loss of Eq. 5 of VAR."""
    f_hat, tokens, sums, losses = torch.zeros_like(f_BCHW), [], [], []
    for si in range(len(PATCH_NUMS)):
        drawn, h = naive_codes(quantizer, f_BCHW - f_hat, si)
        f_hat = f_hat + h
        tokens.append(drawn)
        sums.append(f_hat)
        commitment = ((f_hat.detach() - f_BCHW) ** 2).mean()
        losses.append(quantizer.beta * commitment + ((f_hat - f_BCHW.detach()) ** 2).mean())
    return tokens, sums, sum(losses) / len(losses)


# Which phi serves which scale


def test_four_phi_over_ten_scales():
    assert [nearest_tick(4, si, 10) for si in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("num_scales", [2, 4, 7, 10])
@pytest.mark.parametrize("num_phi", [2, 3, 4, 5])
def test_phi_is_a_nearest_tick(num_phi, num_scales):
    """Ticks are evenly spaced from a margin of 1 / 2K, or 1 / 3K where K = 4."""
    edge = Fraction(1, (3 if num_phi == 4 else 2) * num_phi)
    ticks = [edge + i * (1 - 2 * edge) / (num_phi - 1) for i in range(num_phi)]
    for si in range(num_scales):
        distances = [abs(tick - Fraction(si, num_scales - 1)) for tick in ticks]
        assert distances[nearest_tick(num_phi, si, num_scales)] == min(distances)


@pytest.mark.parametrize(("num_phi", "distinct"), [(0, 10), (1, 1), (2, 2), (4, 4)])
def test_number_of_phi(num_phi, distinct):
    quantizer = MultiScaleQuantizer(4, 8, range(1, 11), num_phi=num_phi)
    used = [quantizer.quant_resi.at(si) for si in range(10)]
    assert len({id(phi) for phi in used}) == distinct
    assert len({id(m) for m in quantizer.modules() if isinstance(m, Phi)}) == distinct
    if num_phi == 0:
        assert used == list(quantizer.quant_resi.children())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_phi_mixes_in_a_convolution(ratio):
    torch.manual_seed(0)
    phi, h = Phi(4, ratio), torch.randn(2, 4, 3, 3)
    expected = (1 - ratio) * h + ratio * F.conv2d(h, phi.weight, phi.bias, padding=1)
    assert_close(phi(h), expected)


# Encoding and summing up


def test_encode_and_partial_sums(quantizer, f_BCHW):
    before, (tokens, sums, _) = f_BCHW.clone(), naive_quantise(quantizer, f_BCHW)
    assert_close(quantizer.encode(f_BCHW), tokens)
    assert_close(quantizer.partial_sums(tokens), sums, **EXACT)
    assert torch.equal(f_BCHW, before)


def test_teacher_input(quantizer, f_BCHW):
    """Row t of scale si is the mean of f_hat, so far, over the cell of token t."""
    tokens, sums, _ = naive_quantise(quantizer, f_BCHW)
    expected = [
        F.adaptive_avg_pool2d(f_hat, p).flatten(2).transpose(1, 2)
        for f_hat, p in zip(sums[:-1], PATCH_NUMS[1:], strict=True)
    ]
    assert_close(quantizer.teacher_input(tokens), torch.cat(expected, dim=1), **EXACT)


# Training


def test_loss_and_its_gradients(quantizer, f_BCHW):
    inputs = [f_BCHW.requires_grad_(), *quantizer.parameters()]
    expected_tokens, sums, expected = naive_quantise(quantizer, f_BCHW)
    f_hat, loss, tokens = quantizer(f_BCHW)
    assert_close(tokens, expected_tokens)
    assert_close(loss, expected, **EXACT)
    assert_close(f_hat, sums[-1], **EXACT)
    gradients = torch.autograd.grad(loss, inputs)
    assert_close(gradients, torch.autograd.grad(expected, inputs), **EXACT)
    assert all(gradient.any() for gradient in gradients)


def test_gradient_is_straight_through(quantizer, f_BCHW):
    f_hat, _, _ = quantizer(f_BCHW.requires_grad_())
    upstream = torch.randn_like(f_hat)
    inputs = [f_BCHW, *quantizer.parameters()]
    to_f, *to_weights = torch.autograd.grad(f_hat, inputs, upstream, allow_unused=True)
    assert torch.equal(to_f, upstream)
    assert all(gradient is None for gradient in to_weights)


@pytest.fixture
def half():
    """A quantiser in bfloat16, the same values in float64, and features of bfloat16."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(64, 8, PATCH_NUMS, num_phi=2)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    quantizer.bfloat16()
    double = MultiScaleQuantizer(64, 8, PATCH_NUMS, num_phi=2).double()
    double.load_state_dict(quantizer.state_dict())
    return quantizer, double, torch.randn(16, 8, 5, 5).bfloat16()


def test_half_precision_codes_and_adds_up_as_float64(half):
    """The values are of 8 bits; what is computed with them is not."""
    quantizer, double, f_BCHW = half
    tokens = double.encode(f_BCHW.double())
    assert all(map(torch.equal, quantizer.encode(f_BCHW), tokens))
    f_hat_BCHW, loss, found = quantizer(f_BCHW)
    exact_BCHW, exact_loss, _ = double(f_BCHW.double())
    assert all(map(torch.equal, found, tokens))
    assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
    ours = [*quantizer.partial_sums(tokens), quantizer.teacher_input(tokens), f_hat_BCHW]
    exact = [*double.partial_sums(tokens), double.teacher_input(tokens), exact_BCHW]
    assert {each.dtype for each in ours} == {torch.float32}
    assert_close([each.double() for each in ours], exact, rtol=0, atol=1e-5)


def test_autocast_changes_nothing(half):
    """Float32 weights and features that autocast left in bfloat16: as without it."""
    _, double, f_BCHW = half
    quantizer = double.float()
    plain = quantizer(f_BCHW.float())
    with torch.autocast("cpu", torch.bfloat16):
        inside, tokens = quantizer(f_BCHW), quantizer.encode(f_BCHW)
    assert torch.equal(plain[0], inside[0])
    assert all(map(torch.equal, plain[2], inside[2]))
    assert all(map(torch.equal, plain[2], tokens))
