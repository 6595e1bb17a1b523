"""Drafter and refiner: each computes what it would under teacher forcing, and just that counts."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.testing import assert_close
from watching import Scales

from dmoe_var import CollaborativeVAR, DynamicVAR, Random, Threshold, count_flops, generate
from dmoe_var.conversion.relufication import relufy
from dmoe_var.metrics.flops_fixed import fixed_cost

LABELS = [0, 3, 1]
SMALL = {"top_k": 20, "top_p": 0.9, "seed": 2}
CFG = (1.5, 1.5, 1.5, 0.0)
TOKENS, ENDS = (1, 4, 9, 16), (1, 5, 14, 30)


@pytest.fixture(scope="module")
def vqvae(make_vqvae):
    return make_vqvae().double()


@pytest.fixture(scope="module")
def drafter(make_var):
    return make_var(seed=5, depth=3, width=96, num_heads=3, shared_adaln=True).double()


@pytest.fixture(scope="module")
def refiners(make_var, make_moe):
    dense, relu = make_var(seed=0).double(), relufy(make_var(seed=1)).double()
    moe = make_moe(relu)
    return {
        "dense": dense,
        "moe": moe,
        "dynamic": DynamicVAR(dense, moe, (2, 3), Threshold(0.6)),
        "unsplit": DynamicVAR(dense, relu, (1, 2, 3)),
    }


def passes(model, **options):
    """Scales since and up to the last one, predicted tokens and rows of each step."""
    plan = model.plan(**options)
    return [(step.since, step.si, step.num_predicted, step.branches) for step in plan]


DRAFTED = [(0, 0, 1, 2), (1, 1, 4, 2)]


def test_plan(drafter, refiners):
    """What was drafted passes with the refiner's first scale; by backbone, and scale by scale where
    experts are selected. Rows that no later step reads do not pass."""

    def plan(name, drafted):
        return passes(CollaborativeVAR(drafter, refiners[name], drafted), branches=(2, 2, 2, 1))

    assert plan("dense", 2) == [*DRAFTED, (0, 2, 9, 2), (3, 3, 16, 1)]
    assert plan("dense", 3) == [*DRAFTED, (2, 2, 9, 2), (0, 3, 16, 1)]
    assert plan("dynamic", 1) == [*DRAFTED[:1], (0, 1, 4, 2), (2, 2, 9, 2), (3, 3, 16, 1)]
    three = [*DRAFTED, (2, 2, 9, 2), (0, 1, 0, 1), (2, 2, 0, 1), (3, 3, 16, 1)]
    assert plan("dynamic", 3) == three
    assert plan("moe", 1) == [*DRAFTED[:1], (0, 0, 0, 2), (1, 1, 4, 2), *three[2:3], (3, 3, 16, 1)]
    assert plan("unsplit", 2) == [*DRAFTED, (0, 0, 0, 2), (1, 2, 9, 2), (3, 3, 16, 1)]
    projecting = CollaborativeVAR(drafter, refiners["dynamic"], 1).plan()
    assert [step.projects for step in projecting] == [True, True, True, False]


@pytest.mark.parametrize("name", ["dense", "dynamic", "moe", "unsplit"])
@pytest.mark.parametrize("drafted", range(5))
def test_teacher_forced(drafter, refiners, make_teacher, name, drafted):
    """Each scale has the logits of the model that draws it, computed by itself."""
    refiner, teacher = refiners[name], make_teacher(drafter, len(LABELS))
    found = CollaborativeVAR(drafter, refiner, drafted)(LABELS, teacher)
    start = (0, *ENDS)[drafted]
    assert_close(found[:, :start], drafter(LABELS, teacher)[:, :start], rtol=0, atol=1e-5)
    assert_close(found[:, start:], refiner(LABELS, teacher)[:, start:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "drafted", "cfg"),
    [("dense", 2, 1.5), ("dense", 3, CFG), ("dense", 1, 0.0), ("dynamic", 1, CFG),
     ("dynamic", 3, CFG), ("dynamic", 2, 1.5)],
)  # fmt: skip
def test_likeliest_tokens(drafter, refiners, vqvae, name, drafted, cfg):
    """Each drawn scale follows from the ones before, by masked passes of each model over both
    halves of guidance."""
    sums, refiner, tau = [], refiners[name], None if name == "dense" else 0.5
    model = CollaborativeVAR(drafter, refiner, drafted)
    options = {"cfg": cfg, "tau": tau, "observer": Scales(lambda si, f_hat: sums.append(f_hat))}
    generate(model, vqvae, LABELS, top_k=1, **options)
    quantize, forced = vqvae.quantize, {} if name == "dense" else {"tau": tau}
    teacher = torch.cat([quantize.next_input(f, si) for si, f in enumerate(sums[:-1], 1)], 1)
    teacher, labels = teacher.repeat(2, 1, 1), [*LABELS, 5, 5, 5]
    logits = {True: drafter(labels, teacher), False: refiner(labels, teacher, **forced)}
    before = torch.zeros_like(sums[0])
    for si, (num, end, f_hat) in enumerate(zip(TOKENS, ENDS, sums, strict=True)):
        cond, null = logits[si < drafted][:, end - num : end].chunk(2)
        t = (cfg if isinstance(cfg, float) else cfg[si]) * si / 3
        codes = quantize.lookup(((1 + t) * cond - t * null).argmax(-1), si)
        assert_close(f_hat - before, quantize.spread(codes, si), rtol=0, atol=1e-6)
        before = f_hat


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg": CFG, "tau": 0.5, "share_mask": True},
        {"selection": Random(2), "adaln_every_scale": True},
        {"generator": True, "more_smooth": True},
    ],
    ids=str,
)
def test_a_model_alone(drafter, refiners, vqvae, options):
    """With no scale drafted, or all of them, the images are bitwise those of the plain sampler."""

    def drawn(model, **kept):
        given = {"generator": torch.Generator().manual_seed(3)} if "generator" in options else {}
        return generate(model, vqvae, LABELS, **SMALL, **{**kept, **given})

    refiner = refiners["dynamic"]
    alone = CollaborativeVAR(drafter, refiner, 0)
    assert torch.equal(drawn(alone, **options), drawn(refiner, **options))
    dense = {key: value for key, value in options.items() if key not in ("tau", "selection")}
    drafting = CollaborativeVAR(drafter, refiner, 4)
    assert torch.equal(drawn(drafting, **dense), drawn(drafter, **dense))
    between = [drawn(CollaborativeVAR(drafter, refiner, n), **options) for n in (1, 3)]
    assert not torch.equal(*between)


def macs_of(config, rows, tokens, keys, predicted):
    """Of one pass, from its shapes alone. A masked product is computed in full."""
    depth, width = config.depth, config.C
    return rows * (
        depth * (12 * width**2 * tokens + 2 * width * tokens * keys)
        + predicted * width * config.vocab_size
    )


def test_flops(drafter, refiners, vqvae):
    """What ran, and no more: unpredicted tokens have no logits, the null half ends early."""
    dense, dynamic = refiners["dense"], refiners["dynamic"]
    drafts = macs_of(drafter.config, 2, 1, 1, 1) + macs_of(drafter.config, 2, 4, 5, 4)
    joined = macs_of(dense.config, 2, 14, 14, 9) + macs_of(dense.config, 1, 16, 30, 16)
    adaln = 2 * 6 * (96**2 + 2 * 64**2)
    fixed = fixed_cost(CollaborativeVAR(drafter, dense, 2), vqvae, CFG)
    known = sum(sum(macs) for part, macs in fixed.macs.items() if part != "other")
    assert known == drafts + joined + adaln
    words = 8 * (96 * 4 + 64 * (4 + 9 + 16))
    assert sum(fixed.macs["other"]) == words + 4 * 9 * 8**2 * 16 + 2 * 2 * (96**2 + 64**2)
    # Experts: those of scale 2 run on what was drafted there, in the one half that is read again
    model, pair = CollaborativeVAR(drafter, dynamic, 3), 2 * 64 * 32
    report = count_flops(model, vqvae, LABELS, cfg=CFG, tau=0.5)
    drafts += macs_of(drafter.config, 2, 9, 14, 9)
    fills = macs_of(dense.config, 1, 5, 5, 0) + macs_of(dense.config, 1, 9, 14, 0)
    fills += macs_of(dense.config, 1, 16, 30, 16) - 2 * 25 * 8 * 64**2
    adaln = 6 * (2 * 96**2 + (2 + 2) * 64**2)
    known = sum(sum(macs) for part, macs in report.fixed.macs.items() if part != "other")
    assert known == drafts + fills + adaln
    assert {si: cost.num_pairs for si, cost in report.fixed.experts.items()} == {2: 144, 3: 256}
    ran = sum(sum(pairs) for pairs in report.pairs.values()) / len(LABELS)
    assert report.by_part_gmac["experts"] == pytest.approx(ran * pair / 1e9)
    assert 0 < ran < 400


def test_the_drafter_is_forgotten(drafter, refiners, vqvae, monkeypatch):
    """Its cache is gone before the refiner's is made."""
    caches, new_cache = [], type(drafter).new_cache

    def made(model, batch):
        gc.collect()
        alive = [ref for ref in caches if ref() is not None]
        assert not alive
        cache = new_cache(model, batch)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(type(drafter), "new_cache", made)
    generate(CollaborativeVAR(drafter, refiners["dynamic"], 2), vqvae, LABELS, tau=0.5, **SMALL)
    assert len(caches) == 2


def test_misfits(drafter, refiners, make_var, vqvae):
    for wrong, message in (
        ({"num_classes": 7}, "num_classes: the drafter has 7, the refiner has 5"),
        ({"patch_nums": (1, 2, 4)}, r"patch_nums: the drafter has \(1, 2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            CollaborativeVAR(make_var(**wrong), refiners["dense"], 1)
    for drafted in (-1, 5, 1.5):
        with pytest.raises(ValueError, match=f"drafted_scales={drafted}"):
            CollaborativeVAR(drafter, refiners["dense"], drafted)
    with pytest.raises(ValueError, match="the drafter has experts"):
        CollaborativeVAR(refiners["moe"], refiners["dense"], 1)
    with pytest.raises(ValueError, match="tau is given, but the model has no experts"):
        generate(CollaborativeVAR(drafter, refiners["dynamic"], 4), vqvae, LABELS, tau=0.5)
