"""Stepping over a K/V cache, without any mask, equals the masked teacher-forced pass."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.models.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("no_grad")


def stepped(var, labels, teacher):
    """Logits of all scales, one `step` a scale."""
    cond = var.condition(labels)
    mod, cache, logits = var.modulation(cond), var.new_cache(len(labels)), []
    first = var.config.scale_slices[0].stop
    for si, tokens in enumerate(var.config.scale_slices):
        given = teacher[:, max(tokens.start - first, 0) : tokens.stop - first]
        x = var.embed_scale(given, si) if si else var.embed_start(cond)
        logits.append(var.step(x, mod, cache))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "fields", [{"shared_adaln": True}, {"attn_l2_norm": False, "patch_nums": (2, 3, 4)}], ids=str
)
@pytest.mark.parametrize("split", [False, True])
def test_stepping_equals_the_masked_pass(
    make_var, make_moe, make_teacher, head_inputs, fields, split
):
    var = make_var(**fields).double()
    if split:
        var = make_moe(var)
    labels, teacher = torch.tensor([1, 5]), make_teacher(var)
    with head_inputs(var) as masked_h:
        masked = var(labels, teacher)
    with head_inputs(var) as stepped_h:
        logits = stepped(var, labels, teacher)
    assert_close(torch.cat(stepped_h, dim=1), masked_h[0], rtol=0, atol=1e-12)
    assert_close(logits, masked, rtol=0, atol=1e-5)


@pytest.fixture
def cache():
    return KVCache((2, 3, 2, 5, 4), torch.empty(0, dtype=torch.float64))


def test_append_returns_all_so_far_of_that_layer(cache):
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 3, 2, 5, 4, dtype=torch.float64)  # k and v, by layer
    for tokens in (slice(0, 1), slice(1, 5)):
        for layer in (0, 1):
            now = k[layer][:, :, tokens], v[layer][:, :, tokens]
            so_far = k[layer][:, :, : tokens.stop], v[layer][:, :, : tokens.stop]
            assert_close(cache.append(layer, *now), so_far, rtol=0, atol=0)
            cache.advance(layer, tokens.stop - tokens.start)
    assert cache.lengths == [5, 5]


def test_layers_may_hold_different_numbers_of_tokens(cache):
    cache.advance(1, 3)
    ones = torch.ones(3, 2, 1, 4)
    assert [len(cache.append(layer, ones, ones)[0][0, 0]) for layer in (0, 1)] == [1, 4]


def test_a_full_cache_raises(cache):
    cache.advance(0, 4)
    two = torch.zeros(3, 2, 2, 4)
    with pytest.raises(ValueError, match="holds 5 tokens, 6"):
        cache.append(0, two, two)


def test_caches_are_in_the_compute_dtype(make_var):
    var = make_var().to(torch.bfloat16)
    k, v = var.new_cache(2).append(0, *torch.ones(2, 2, 2, 1, 32))
    assert k.dtype == v.dtype == torch.bfloat16
