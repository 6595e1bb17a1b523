"""Means of what skipped experts would have added, against sums that are taken token by token."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import DynamicVAR, Threshold, TopK
from dmoe_var.calibration.skipped_means import measure_skipped_means
from dmoe_var.conversion.relufication import relufy
from dmoe_var.models.dynamic_var import teacher_forced
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.selection import LayerThreshold
from dmoe_var.moe.skipped_means import SkippedMeans

pytestmark = pytest.mark.usefixtures("no_grad")

SCALES = (1, 3)
LABELS = torch.tensor([1, 4, 0])
NULL = torch.full_like(LABELS, 5)


class Inputs(Observer):
    """Keeps what enters the expert FFNs."""

    def __init__(self):
        self.seen = []

    def on_routing(self, routed):
        self.seen.append(routed)


@pytest.fixture(scope="module")
def dynamic(make_var, make_moe):
    dense, relu = make_var(seed=0).double(), relufy(make_var(seed=1)).double()
    return DynamicVAR(dense, make_moe(relu), SCALES)


def by_hand(seen):
    """The mean output over skipping tokens by (scale, layer, expert), from inputs and masks."""
    outputs = {}
    for each in seen:
        ffn, x_NC, mask_NE = each.ffn, each.x_BLC.flatten(0, 1), each.mask_BLE.flatten(0, 1)
        for x_C, mask_E in zip(x_NC, mask_NE, strict=True):
            for e in range(8):
                cell = outputs.setdefault((each.si, each.layer, e), [torch.zeros(64).double(), 0])
                if not mask_E[e]:
                    h_D = (ffn.w1_EDC[e] @ x_C + ffn.b1_ED[e]).clamp(min=0)
                    cell[0] += ffn.w2_EDC[e].T @ h_D
                    cell[1] += 1
    return {at: total / max(number, 1) for at, (total, number) in outputs.items()}


@pytest.mark.parametrize(
    ("selection", "cfg"),
    [
        (Threshold(0.6), 1.5),
        ([Threshold(0.5), TopK(3)], (1.5, 1.5, 1.5, 0)),
        ([LayerThreshold((0.7, 0.0)), LayerThreshold((0.4, 0.9))], 0),
    ],
    ids=str,
)
def test_means(dynamic, make_teacher, selection, cfg):
    """Of the rows that the sampler runs, over all batches, each token weighing the same; what a
    model has been given plays no part."""
    teacher = make_teacher(dynamic.dense, 3)
    seen = Inputs()
    for labels in (LABELS, NULL):
        dynamic.set_skipped(None)
        dynamic(labels, teacher, selection=selection, observer=seen)
    guided = {1.5: SCALES, 0: ()}.get(cfg, (1,))
    kept = [
        each
        for i, each in enumerate(seen.seen)
        if i < len(seen.seen) // 2 or each.si in guided  # the second half has the null class
    ]
    expected = by_hand(kept)
    if cfg == 0:  # tau 0 skips nothing
        assert not any(expected[1, 1, e].any() for e in range(8))
    dynamic.set_skipped(SkippedMeans({si: torch.ones(2, 8, 64) for si in SCALES}))
    batches = [(LABELS[:2], teacher[:2]), (LABELS[2:], teacher[2:])]
    found = measure_skipped_means(dynamic, batches, selection, cfg, impl="reference")
    assert found.scales == SCALES
    for (si, layer, e), mean_C in expected.items():
        assert_close(found.at(si)[layer, e], mean_C, rtol=0, atol=1e-12)
    assert found.selection == (selection if isinstance(selection, list) else [selection] * 2)


def test_shared_masks(dynamic, make_teacher):
    """Both halves skip what the first one does; their inputs differ."""
    seen = Inputs()
    given = (LABELS, make_teacher(dynamic.dense, 3), {si: Threshold(0.6) for si in SCALES})
    list(teacher_forced(dynamic, *given, "reference", seen, (2, 2, 2, 2), share_mask=True))
    expected = by_hand(seen.seen)
    for each in seen.seen:
        cond, null = each.mask_BLE.chunk(2)
        assert torch.equal(cond, null)
        assert not torch.equal(*each.x_BLC.chunk(2))
    found = measure_skipped_means(dynamic, [given[:2]], Threshold(0.6), share_mask=True)
    for (si, layer, e), mean_C in expected.items():
        assert_close(found.at(si)[layer, e], mean_C, rtol=0, atol=1e-12)


def test_nothing_to_measure(dynamic):
    with pytest.raises(ValueError, match="a rule that skips some"):
        measure_skipped_means(dynamic, [])
