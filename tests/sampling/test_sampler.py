"""The sampler against the published one's images, and what must not change an image."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from watching import Scales

from dmoe_var import DynamicVAR, Random, Threshold, generate
from dmoe_var.conversion.relufication import relufy
from dmoe_var.moe.counts import ExpertCounts

LABELS = [0, 1, 2, 3, 4, 5, 2, 1]
TOLERANCE = {"rtol": 0, "atol": 1e-4}
SMALL = {"top_k": 20, "top_p": 0.9}


def differ(a, b):
    return (a - b).abs().amax((1, 2, 3)) > 1e-2


@pytest.fixture(scope="module")
def vqvae(make_vqvae):
    return make_vqvae()


@pytest.fixture(scope="module")
def dense(make_var):
    return make_var(seed=0)


@pytest.fixture(scope="module")
def relu(make_var):
    return relufy(make_var(seed=1))


@pytest.fixture(scope="module")
def dynamic(dense, relu, make_moe):
    return DynamicVAR(dense, make_moe(relu), (2, 3))


def test_a_temperature_is_the_same_as_larger_logits(dense, vqvae):
    """Weights of the head times 1 / T give the images that T gives; 1 changes nothing, by scale or
    at all of them."""
    hotter = copy.deepcopy(dense)
    with torch.no_grad():
        hotter.head.weight.mul_(1 / 0.5)
        hotter.head.bias.mul_(1 / 0.5)
    plain = generate(dense, vqvae, LABELS, **SMALL)
    assert torch.equal(generate(hotter, vqvae, LABELS, **SMALL), generate(
        dense, vqvae, LABELS, temperature=0.5, **SMALL
    ))  # fmt: skip
    assert torch.equal(generate(dense, vqvae, LABELS, temperature=[1.0] * 4, **SMALL), plain)
    late = generate(dense, vqvae, LABELS, temperature=[1, 1, 1, 0.2], **SMALL)
    assert not torch.equal(late, plain)
    maps = []
    for given in (None, [1, 1, 1, 0.2]):
        observer = Scales(lambda si, f_hat_BCHW: maps.append(f_hat_BCHW.clone()))
        generate(dense, vqvae, LABELS, temperature=given, observer=observer, **SMALL)
    assert [torch.equal(maps[si], maps[4 + si]) for si in range(4)] == [True, True, True, False]


# The published sampler's images


@pytest.mark.parametrize(
    ("cfg", "options"),
    [
        (0.0, {}),
        (1.5, {}),
        (1.5, {"generator": True}),
        (4.0, {}),
        (4.0, {"adaln_every_scale": True}),
    ],
    ids=str,
)
def test_greedy_images_are_the_published_ones(parity, cfg, options, libraries):
    options = {k: torch.Generator() if k == "generator" else v for k, v in options.items()}
    images = generate(parity.var, parity.vqvae, parity.io["label"], cfg, top_k=1, **options)
    assert_close(parity.pixels(images), parity.io[f"greedy_image.cfg{cfg}"], **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "cfg", "top_p", "seed", "more_smooth"),
    [
        ("sampled_image.cfg1.5.seed0", 1.5, 0.96, 0, False),
        ("sampled_image.cfg4.seed3.smooth", 4, 0.95, 3, True),
    ],
)
def test_sampled_images_are_the_published_ones(
    parity, name, cfg, top_p, seed, more_smooth, libraries
):
    with parity.draws():
        images = generate(
            parity.var,
            parity.vqvae,
            parity.io["label"],
            cfg=cfg,
            top_k=parity.config["vocab_size"] // 4,
            top_p=top_p,
            more_smooth=more_smooth,
            generator=torch.Generator().manual_seed(seed),
        )
    assert_close(parity.pixels(images), parity.io[name], **TOLERANCE)


# What must not change an image


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tau": 0.5},
        {"more_smooth": True, "tau": 0.5},
        {"cfg": 0.0, "selection": Random(2)},
        {"selection": Random(2), "share_mask": True},
    ],
    ids=str,
)
def test_batch_size_does_not_change_an_image(dynamic, vqvae, options, libraries):
    options = SMALL | options
    together = generate(dynamic, vqvae, LABELS, seed=3, start_index=5, **options)
    assert together.shape == (8, 3, 8, 8)
    assert (together.min(), together.max()) >= (0, 0)
    assert together.max() <= 1
    one_by_one = [
        generate(dynamic, vqvae, [label], seed=3, start_index=5 + i, **options)
        for i, label in enumerate(LABELS)
    ]
    assert_close(torch.cat(one_by_one), together, **TOLERANCE)
    assert differ(together[2:3], together[6:7]).all()  # the same class, another stream


@pytest.mark.parametrize("rule", [Threshold(0.5), Random(2)], ids=repr)
def test_both_halves_of_guidance_share_a_mask(dynamic, vqvae, rule):
    shared, own = ExpertCounts(), ExpertCounts()
    options = SMALL | {"selection": rule}
    images = generate(dynamic, vqvae, LABELS, observer=shared, share_mask=True, **options)
    others = generate(dynamic, vqvae, LABELS, observer=own, **options)
    for si in dynamic.moe_scales:
        cond, null = shared.per_token(si).chunk(2, dim=1)
        assert torch.equal(cond, null)
    assert differ(images, others).any()


@pytest.mark.parametrize("options", [{"tau": 0}, {"cfg": 0, "tau": 0.5}], ids=str)
def test_where_there_is_nothing_to_share(dynamic, vqvae, options):
    """All experts run, or there is one half."""
    images = [generate(dynamic, vqvae, LABELS, **SMALL | options, share_mask=s) for s in (0, 1)]
    assert torch.equal(*images)


@pytest.mark.parametrize("change", [{"seed": 1}, {"start_index": 8}], ids=str)
def test_seed_and_index_change_every_image(dynamic, vqvae, change):
    images, changed = (generate(dynamic, vqvae, LABELS, **SMALL, **c) for c in ({}, change))
    assert differ(images, changed).all()


def test_a_call_repeats_and_leaves_the_global_generator_alone(dynamic, vqvae):
    state = torch.get_rng_state()
    first, again = (generate(dynamic, vqvae, LABELS, tau=0.3, **SMALL) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_generator_serves_all_images(dynamic, vqvae):
    def images(generator_seed, **options):
        generator = torch.Generator().manual_seed(generator_seed)
        return generate(dynamic, vqvae, LABELS, generator=generator, **SMALL, **options)

    assert torch.equal(images(0), images(0, seed=7, start_index=7))
    assert differ(images(0), images(1)).all()


# Guidance


def test_without_guidance_only_the_conditional_branch_runs(dynamic, vqvae):
    rows, images = {}, {}
    for cfg in (0.0, 1e-7):
        counts = ExpertCounts()
        images[cfg] = generate(dynamic, vqvae, LABELS, cfg=cfg, tau=0.3, observer=counts, **SMALL)
        rows[cfg] = counts.per_token(3).shape[1]
    assert rows == {0.0: 8, 1e-7: 16}
    assert_close(images[0.0], images[1e-7], **TOLERANCE)


def test_guidance_starts_at_the_second_scale(dense, vqvae):
    def f_hats(cfg):
        seen = []
        scales = Scales(lambda _, f_hat: seen.append(f_hat))
        generate(dense, vqvae, LABELS, cfg, observer=scales, **SMALL)
        return seen

    weak, strong = f_hats(0.5), f_hats(8.0)
    assert torch.equal(weak[0], strong[0])
    assert not torch.equal(weak[1], strong[1])


# Experts


def test_tau_0_is_the_unsplit_relu_model(dense, relu, dynamic, vqvae):
    unsplit = generate(DynamicVAR(dense, relu, (2, 3)), vqvae, LABELS, **SMALL)
    for options in ({}, {"tau": 0.0}, {"tau": [0.9, 0.9, 0.0, 0.0]}):
        assert_close(generate(dynamic, vqvae, LABELS, **SMALL, **options), unsplit, **TOLERANCE)
    assert differ(generate(dense, vqvae, LABELS, **SMALL), unsplit).any()


def test_a_moe_var_alone_has_experts_at_every_scale(relu, make_moe, vqvae):
    counts = ExpertCounts()
    generate(make_moe(relu), vqvae, LABELS, tau=1.0, observer=counts)
    assert counts.scales == [0, 1, 2, 3]
    assert all((counts.per_token(si) == 1).all() for si in counts.scales)


def test_on_scale_sees_every_partial_sum(dynamic, vqvae):
    seen = []
    images = generate(
        dynamic, vqvae, LABELS, observer=Scales(lambda *args: seen.append(args)), tau=0.3, **SMALL
    )
    assert [si for si, _ in seen] == [0, 1, 2, 3]
    with torch.no_grad():
        decoded = vqvae.decoder(vqvae.post_quant_conv(seen[-1][1])).clamp(-1, 1)
    assert_close(images, decoded * 0.5 + 0.5, **TOLERANCE)


def test_bfloat16_gives_images(dynamic, vqvae):
    model = DynamicVAR(dynamic.dense, dynamic.moe, (2, 3))
    images = generate(model.to(torch.bfloat16), vqvae, LABELS, tau=0.3, **SMALL)
    model.float()
    assert images.dtype == torch.float32
    assert images.isfinite().all()
