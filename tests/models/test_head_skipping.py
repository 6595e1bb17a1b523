"""Head skipping: which heads are projected, what it costs, what it leaves alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import CollaborativeVAR, HeadSkipping, Random, TokenSkipping, count_flops, generate
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.models.head_skipping import Heads, metrics
from dmoe_var.models.int8 import in_precision

LABELS = [0, 1, 2, 3]
SMALL = {"top_k": 20, "top_p": 0.9, "seed": 2}
HALF = HeadSkipping((0.0, 0.0, 0.5, 0.5))
C, H, D = 64, 2, 32


def measured(measure, a_D, W_CD):
    """A head's output norm, or what bounds it."""
    return (a_D @ W_CD.T).norm() if measure == "norm" else a_D.norm() * W_CD.norm()


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("measure", ["norm", "bound"])
@pytest.mark.parametrize("num_kept", [1, 2, 3])
def test_a_projection(num_kept, measure):
    """Against its sum in float64, token by token; one head of four is silent."""
    draw = torch.Generator().manual_seed(0)
    proj = torch.nn.Linear(24, 24).double()
    a_BHLD = torch.randn(2, 4, 5, 6, generator=draw, dtype=torch.float64)
    a_BHLD[:, 1] = 0
    heads = Heads(num_kept, metrics([torch.nn.Linear(24, 24), proj], 4, measure)).at(1)
    found = heads.project(a_BHLD, proj)
    weights = proj.weight.split(6, 1)
    for row, place in torch.cartesian_prod(torch.arange(2), torch.arange(5)):
        heads_HD = a_BHLD[row, :, place]
        order = sorted(range(4), key=lambda i: -measured(measure, heads_HD[i], weights[i]))
        expected = sum(heads_HD[i] @ weights[i].T for i in order[:num_kept]) + proj.bias
        assert_close(found[row, place], expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("measure", ["norm", "bound"])
def test_measures_of_half_precision_are_not_rounded(dynamic, measure):
    proj = copy.deepcopy(dynamic.dense.blocks[1].attn.proj).bfloat16()
    a_HND = torch.randn(H, 7, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = Heads(1, metrics([proj], H, measure)).measures(a_HND).sqrt()
    weights = proj.weight.double().split(D, 1)
    true = [
        torch.stack([measured(measure, a_D, W) for a_D in a_ND.double()])
        for a_ND, W in zip(a_HND, weights, strict=True)
    ]
    assert_close(found.double(), torch.stack(true), rtol=1e-5, atol=0)


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


@pytest.mark.parametrize("measure", ["norm", "bound"])
def test_flops(make_var, vqvae, measure):
    """By hand: two rows, two layers; three heads of eight are left out, all are measured."""
    model, ratios = make_var(num_heads=8), (0.0, 0.0, 0.4, 0.4)
    report = count_flops(model, vqvae, LABELS, heads=HeadSkipping(ratios, measure), **SMALL)
    plain = fixed_cost(model, vqvae)
    for si, p in enumerate((1, 2, 3, 4)):
        saved = 3 * C * C // 8 - (C * C // 8 if measure == "norm" else 0) if si > 1 else 0
        assert report.fixed.macs["qkv_proj"][si] == plain.macs["qkv_proj"][si] - 4 * p * p * saved
    assert report.fixed.macs["attention"] == plain.macs["attention"]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("ratios", [HALF.ratios, (0.5, 0.0, 0.0, 0.5), (0.0, 0.5, 0.5, 0.0)])
@pytest.mark.parametrize("drafted", [1, 3, 4])
def test_a_drafter_and_its_refiner(dynamic, vqvae, ratios, drafted):
    """Known scales pass the refiner as if it had drawn them, on as many heads."""
    heads, dense = HeadSkipping(ratios), dynamic.dense
    alone = generate(dense, vqvae, LABELS, heads=heads, **SMALL)
    joined = CollaborativeVAR(dense, copy.deepcopy(dense), drafted)
    assert_close(generate(joined, vqvae, LABELS, heads=heads, **SMALL), alone, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("fields", [{"ratios": (1.0,)}, {"measure": "score"}])
def test_fields_have_limits(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name}="):
        HeadSkipping(**fields)


def test_8_bits_have_no_heads(dynamic, vqvae):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"^heads.ratios: projections in 8 bits"):
        generate(in_precision(dynamic, "dynamic"), vqvae, LABELS, heads=HALF)
