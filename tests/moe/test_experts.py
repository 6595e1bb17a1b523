"""Every compute path against a loop over tokens and experts in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dmoe_var.moe.experts import ExpertWeights, paths_on, run_experts

IMPLS = ["auto", *paths_on(torch.device("cpu"))]
C = 12
# N tokens, E experts, D neurons an expert
SIZES = [(1, 1, 4), (1, 5, 3), (17, 5, 3), (16, 1, 4), (33, 8, 1)]


def ragged(N, E):
    """Expert e runs on the first e tokens: the first on none, the last token has few or none."""
    return torch.arange(N)[:, None] < torch.arange(E)


def half(N, E):
    return torch.rand(N, E, generator=torch.Generator().manual_seed(0)) < 0.5


def all_off(N, E):
    return torch.zeros(N, E, dtype=torch.bool)


MASKS = [ragged, half, all_off]


def random_layer(E, D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape):
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        return values.to(dtype).requires_grad_()

    return ExpertWeights(tensor(E, D, C), tensor(E, D), tensor(E, D, C), tensor(C))


def random_tokens(N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(N, C, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def naive(x_NC, mask_NE, weights, act):
    """Per token, per expert, per neuron."""
    rows = []
    for x_C, mask_E in zip(x_NC, mask_NE.tolist(), strict=True):
        out_C = weights.b2_C
        for e, runs in enumerate(mask_E):
            if not runs:
                continue
            for d in range(weights.w1_EDC.shape[1]):
                hidden = act((weights.w1_EDC[e, d] * x_C).sum() + weights.b1_ED[e, d])
                out_C = out_C + hidden * weights.w2_EDC[e, d]
        rows.append(out_C)
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ["reference", "grouped"])
@pytest.mark.parametrize("make_mask", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(impl, make_mask, sizes):
    N, E, D = sizes
    x_NC, mask_NE, weights = random_tokens(N), make_mask(N, E), random_layer(E, D)
    inputs, act = (x_NC, *weights), nn.GELU(approximate="tanh")
    expected = naive(x_NC, mask_NE, weights, act)
    out = run_experts(x_NC, mask_NE, weights, act, impl)
    assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"allow_unused": True, "materialize_grads": True}
    assert_close(
        torch.autograd.grad(out, inputs, upstream, **options),
        torch.autograd.grad(expected, inputs, upstream, **options),
        rtol=0,
        atol=1e-12,
    )


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(approximate="tanh")])
def test_float32_is_close_to_float64(impl, act):
    N, E, D = 50, 6, 16
    single = random_tokens(N, torch.float32), random_layer(E, D, torch.float32)
    double = single[0].double(), ExpertWeights(*(w.double() for w in single[1]))
    out = run_experts(single[0], half(N, E), single[1], act, impl)
    expected = run_experts(double[0], half(N, E), double[1], act, "reference")
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 1e-6 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(32, 16), (256, 4)], ids=str)
def test_half_precision_is_as_exact_as_a_dense_ffn(impl, sizes):
    """Whatever the number of experts: hidden activations and the sum are rounded once each."""
    E, D = sizes
    N, width = 48, 64
    generator = torch.Generator().manual_seed(0)
    shapes = ((E, D, width), (E, D), (E, D, width), (width,))
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[0] /= width**0.5
    weights = ExpertWeights(*(w.bfloat16() for w in weights))
    x_NC = torch.randn(N, width, generator=generator).bfloat16()
    mask_NE, act = torch.rand(N, E, generator=generator) < 0.6, nn.GELU(approximate="tanh")
    wide = ExpertWeights(*(w.double() for w in weights))
    exact = run_experts(x_NC.double(), mask_NE, wide, act, "reference")
    out = run_experts(x_NC, mask_NE, weights, act, impl)
    assert out.dtype == torch.bfloat16
    # Three roundings to 8 bits (before and after the activation, and the sum), each at most 2**-8
    # of the value and rather less than half of that as a root mean square.
    assert (out.double() - exact).norm() <= 3**0.5 * 2.0**-9 * exact.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl):
    out = run_experts(torch.zeros(0, C).double(), half(0, 5), random_layer(5, 3), nn.ReLU(), impl)
    assert out.shape == (0, C)


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
def test_repeated_runs_agree_to_the_bit_and_change_no_input(impl):
    args = random_tokens(64, torch.float32), half(64, 6), random_layer(6, 8, torch.float32)
    before = [t.clone() for t in (args[0], args[1], *args[2])]
    assert torch.equal(*(run_experts(*args, nn.ReLU(), impl) for _ in range(2)))
    assert all(map(torch.equal, before, (args[0], args[1], *args[2])))


def test_unknown_impl_raises():
    with pytest.raises(
        ValueError, match="impl='fast' is none of auto, reference, grouped, native, triton"
    ):
        run_experts(random_tokens(2), half(2, 5), random_layer(5, 3), nn.ReLU(), "fast")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("number", range(4))
def test_weights_fit_each_other(impl, number):
    weights = [*random_layer(5, 3)]
    weights[number] = weights[number][:2]
    with pytest.raises(ValueError, match=r"do not fit each other: w1_EDC \(\d, 3, 12\), b1_ED "):
        run_experts(random_tokens(2), half(2, 5), ExpertWeights(*weights), nn.ReLU(), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_is_bool_and_of_all_tokens_and_experts(impl):
    """A kernel reads its bytes: others would be added up, or lie behind its end."""
    x, weights, mask = random_tokens(2), random_layer(5, 3), half(2, 5)
    for other in (mask.long(), mask.to(torch.uint8), mask.float(), mask[:1], mask[:, :4], mask.T):
        with pytest.raises(ValueError, match=r"^mask_NE is .* of shape .*; allowed: "):
            run_experts(x, other, weights, nn.ReLU(), impl)
