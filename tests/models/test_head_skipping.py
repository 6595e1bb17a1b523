"""Head skipping: which heads are projected, what it costs, what it leaves alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import CollaborativeVAR, HeadSkipping, Random, TokenSkipping, count_flops, generate
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.models.head_skipping import Heads, grams

LABELS = [0, 1, 2, 3]
SMALL = {"top_k": 20, "top_p": 0.9, "seed": 2}
HALF = HeadSkipping((0.0, 0.0, 0.5, 0.5))
C, H, D = 64, 2, 32


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("num_kept", [1, 2, 3])
def test_a_projection(num_kept):
    """Against its sum in float64, token by token; one head of four is silent."""
    draw = torch.Generator().manual_seed(0)
    proj = torch.nn.Linear(24, 24).double()
    a_BHLD = torch.randn(2, 4, 5, 6, generator=draw, dtype=torch.float64)
    a_BHLD[:, 1] = 0
    heads = Heads(num_kept, grams([proj, proj], 4)).at(1)
    found = heads.project(a_BHLD, proj)
    for row, place in torch.cartesian_prod(torch.arange(2), torch.arange(5)):
        outputs = [
            a @ W.T for a, W in zip(a_BHLD[row, :, place], proj.weight.split(6, 1), strict=True)
        ]
        largest = sorted(outputs, key=lambda out: -out.norm())[:num_kept]
        assert_close(found[row, place], sum(largest) + proj.bias, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("no_grad")
def test_norms_of_half_precision_are_exact(dynamic):
    proj = copy.deepcopy(dynamic.dense.blocks[1].attn.proj).bfloat16()
    a_HND = torch.randn(H, 7, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = Heads(1, grams([proj], H)).norms(a_HND)
    weights = proj.weight.double().split(D, 1)
    true = torch.stack(
        [(a.double() @ W.T).norm(dim=-1) for a, W in zip(a_HND, weights, strict=True)]
    )
    assert_close(found.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"tau": 0.5}, {"selection": Random(2)}], ids=str)
def test_none_left_out_is_the_plain_sampler(dynamic, vqvae, options):
    given = (None, HeadSkipping(), HeadSkipping((0.0,) * 4), HeadSkipping((0, 0, 0, 0.2)), HALF)
    plain, *off, on = (
        generate(dynamic, vqvae, LABELS, heads=each, **SMALL, **options) for each in given
    )
    assert all(torch.equal(plain, each) for each in off)
    assert (plain - on).abs().max() > 1e-2


def test_a_head_without_weights_is_left_out_for_nothing(dynamic, vqvae):
    """What no token would have got from it changes no image."""
    model = copy.deepcopy(dynamic.dense)
    for block in model.blocks:
        block.attn.proj.weight.data[:, :D] = 0
    images = [generate(model, vqvae, LABELS, heads=heads, **SMALL) for heads in (None, HALF)]
    assert_close(*images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"cfg": (1.5, 1.5, 1.5, 0.0)},
        {"tau": 0.5, "share_mask": True},
        {"tau": 0.5, "skipping": TokenSkipping((0.0, 0.0, 0.4, 0.5), first_layer=1)},
    ],
    ids=str,
)
def test_an_image_is_the_same_in_any_batch(dynamic, vqvae, options, dtype):
    models = [copy.deepcopy(model).to(dtype) for model in (dynamic, vqvae)]
    options = {**SMALL, **options, "heads": HALF}
    together = generate(*models, LABELS, **options)
    assert together.isfinite().all()
    if dtype == torch.float32:
        alone = [generate(*models, [c], start_index=i, **options) for i, c in enumerate(LABELS)]
        assert_close(torch.cat(alone), together, rtol=0, atol=1e-4)


def test_flops(dynamic, vqvae):
    """By hand: two rows, two layers; one head of two is projected, both are measured."""
    report = count_flops(dynamic, vqvae, LABELS, tau=0.5, heads=HALF, **SMALL)
    plain = fixed_cost(dynamic, vqvae)
    for si, p in enumerate((1, 2, 3, 4)):
        saved = 4 * p * p * (C * D - H * D * D) if si > 1 else 0
        assert report.fixed.macs["qkv_proj"][si] == plain.macs["qkv_proj"][si] - saved
    assert report.fixed.macs["attention"] == plain.macs["attention"]


@pytest.mark.usefixtures("no_grad")
def test_a_drafter_and_its_refiner(dynamic, vqvae):
    """Known scales pass the refiner as if it had drawn them, on as many heads."""
    alone = generate(dynamic.dense, vqvae, LABELS, heads=HALF, **SMALL)
    joined = CollaborativeVAR(dynamic.dense, copy.deepcopy(dynamic.dense), 3)
    assert_close(generate(joined, vqvae, LABELS, heads=HALF, **SMALL), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (HeadSkipping((0.0, 0.5)), "heads.ratios=(0.0, 0.5) has 2 values; allowed: none, or one"),
        (0.5, "heads=0.5 must be a HeadSkipping or None"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(dynamic, vqvae, heads, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        generate(dynamic, vqvae, LABELS, heads=heads)


def test_a_ratio_is_less_than_1():
    with pytest.raises(ValueError, match=r"^ratios="):
        HeadSkipping((1.0,))
