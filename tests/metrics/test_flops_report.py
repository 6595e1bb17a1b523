"""What is told of counted FLOPs: mean and spread over images, by part and scale, by accounting."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmoe_var import Threshold
from dmoe_var.metrics.flops import report
from dmoe_var.metrics.flops_fixed import ExpertCost, FixedCost
from dmoe_var.moe.counts import ExpertCounts, ExpertHistogram

NUM_EXPERTS = 4


def counts_of(*experts_by_row):
    """ExpertCounts of scale 1, one layer: the number of experts of each token of each row."""
    counts = ExpertCounts()
    wanted_RlE = torch.tensor(experts_by_row)[..., None] > torch.arange(NUM_EXPERTS)
    counts.record(1, wanted_RlE)
    return counts


def charge(ran):
    """Of a token on which so many experts ran."""
    return ran / (1 + 0.1 * math.log10(NUM_EXPERTS - ran + 1))


def report_of(rules, *batches):
    """The report of HAND_MADE from batches of so many images and their counts."""
    parts = (ExpertHistogram.of(counts, rules, num_images) for num_images, counts in batches)
    return report(HAND_MADE, ExpertHistogram.joined(parts), rules)


HAND_MADE = FixedCost(
    branches=(2, 2),
    macs=dict.fromkeys(("qkv_proj", "attention", "ffn", "adaln", "other"), (0, 0))
    | {"head": (1 * 10**9, 2 * 10**9)},
    decoder_macs=5 * 10**9,
    experts={1: ExpertCost(num_pairs=16, pair_macs=10**9, router_macs=3 * 10**9)},
)
"""Two scales, the second with experts: two rows of two tokens, NUM_EXPERTS experts, one layer."""


def test_mean_and_spread_over_images_of_different_counts():
    """Rows are [cond of all images; null of all images]; images keep their order over batches."""
    two = counts_of([1, 2], [4, 4], [0, 1], [4, 3])  # images of 1+2+0+1 = 4 and 4+4+4+3 = 15 pairs
    one = counts_of([1, 1], [1, 1])  # an image of 4
    flops = report_of({1: Threshold(0.5)}, (2, two), (1, one))
    assert flops.num_images == 3
    times_NK = [[1, 2, 1, 0, 0], [0, 0, 0, 1, 3], [0, 4, 0, 0, 0]]
    assert flops.ran.times_NSK[:, 0].tolist() == times_NK

    pairs = np.array([4, 15, 4])
    assert flops.pairs == {1: tuple(pairs)}
    assert flops.experts_gmac_per_image == tuple(pairs)
    assert flops.by_part_gmac["experts"] == pytest.approx(pairs.mean())
    assert flops.total_gmac == pytest.approx(1 + 2 + 3 + pairs.mean())
    assert flops.total_gmac_std == pytest.approx(pairs.std())
    assert flops.total_gflop == pytest.approx(2 * flops.total_gmac)
    assert flops.by_scale_gmac == pytest.approx((1, 2 + 3 + pairs.mean()))
    assert flops.expert_share == pytest.approx({1: pairs.mean() / 16})


def test_metrics_are_flat_and_name_their_unit():
    counts = counts_of([1, 2], [4, 4], [0, 1], [4, 3])
    flops = report_of({1: Threshold(0.5)}, (2, counts))
    metrics = flops.metrics()
    charges = 2 * charge(1) + charge(2) + charge(3) + 3 * charge(4)
    assert metrics == pytest.approx({
        "flops_gmac": 15.5, "flops_gmac_std": 5.5, "flops_gflop": 31,
        "flops_gmac_authors": 6 + charges / 2,
        "flops_gmac_min": 10, "flops_gmac_max": 21, "flops_with_decoder_gmac": 20.5,
        "flops_qkv_proj_gmac": 0, "flops_attention_gmac": 0, "flops_ffn_gmac": 0,
        "flops_experts_gmac": 9.5, "flops_router_gmac": 3, "flops_head_gmac": 3,
        "flops_adaln_gmac": 0, "flops_other_gmac": 0, "flops_decoder_gmac": 5,
        "flops_scale0_gmac": 1, "flops_scale1_gmac": 14.5, "experts_share_scale1": 9.5 / 16,
    })  # fmt: skip


def test_the_histogram_is_of_totals():
    """Images of 10, 21 and 10 GMAC; where all are the same there is one bin."""
    rules, one = {1: Threshold(0.5)}, (1, counts_of([1, 1], [1, 1]))
    flops = report_of(rules, (2, counts_of([1, 2], [4, 4], [0, 1], [4, 3])), one)
    edges, images = flops.histogram(bins=4)
    assert edges == pytest.approx((10, 12.75, 15.5, 18.25, 21))
    assert images == (2, 0, 0, 1)
    assert sum(flops.histogram()[1]) == 3
    alone = report_of(rules, one)
    assert alone.histogram() == ((10.0, 10.0), (1,))
    without = report(replace(HAND_MADE, experts={}), ExpertHistogram.none(3), {})
    assert without.histogram() == ((3.0, 3.0), (3,))


@pytest.mark.parametrize(
    "rules", [{}, {0: Threshold(0.5)}, {0: Threshold(0.5), 1: Threshold(0.5)}], ids=str
)
def test_counts_of_other_scales_are_refused(rules):
    counts = counts_of([1, 2], [4, 4], [0, 1], [4, 3])
    with pytest.raises(ValueError, match="experts were counted"):
        ExpertHistogram.of(counts, rules, 2)
    ran = ExpertHistogram.of(counts, {1: Threshold(0.5)}, 2)
    with pytest.raises(ValueError, match="experts were counted"):
        report(HAND_MADE, ran, rules)


def test_counts_of_other_images_are_refused():
    with pytest.raises(ValueError, match="experts were counted for 4 rows of 3 images"):
        report_of({1: Threshold(0.5)}, (3, counts_of([1, 2], [4, 4], [0, 1], [4, 3])))


@pytest.mark.parametrize(
    ("num_images", "experts_by_row"),
    [(1, ([4, 4, 4], [4, 4, 4])), (2, ([1, 2], [0, 1])), (1, ([1, 2],))],
    ids=["more tokens", "half of the rows", "no guidance"],
)
def test_counts_of_another_model_are_refused(num_images, experts_by_row):
    with pytest.raises(ValueError, match="not those of this model"):
        report_of({1: Threshold(0.5)}, (num_images, counts_of(*experts_by_row)))
