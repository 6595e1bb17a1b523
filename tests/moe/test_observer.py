"""What observers are shown, of what was computed without them."""

from __future__ import annotations

import pytest
import torch

from dmoe_var import All, DynamicVAR, Random, Threshold, generate
from dmoe_var.moe.observer import Observer, joined
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import LayerThreshold

SCALES = (1, 3)
SMALL = {"labels": [1, 4, 1], "top_k": 9, "seed": 3}


class Everything(Observer):
    def __init__(self, name="", log=None):
        self.name, self.log = name, [] if log is None else log
        self.routed, self.parts, self.scales = [], [], []

    def on_part(self, part, si):
        self.parts.append((part, si))
        self.log.append(self.name)

    def on_scale(self, si, f_hat_BCHW):
        self.scales.append((si, f_hat_BCHW))
        self.log.append(self.name)

    def on_routing(self, routed):
        self.routed.append(routed)
        self.log.append(self.name)


class Outside(Everything):
    def in_layers(self):
        return None


@pytest.fixture(scope="module")
def models(make_var, make_moe, make_vqvae):
    moe = make_moe(make_var(seed=1, activation="relu"))
    return DynamicVAR(make_var(seed=0), moe, SCALES), make_vqvae()


@pytest.mark.parametrize("share_mask", [False, True])
@pytest.mark.parametrize("rule", [Threshold(0.5), LayerThreshold((0.3, 0.7)), Random(2), All()])
def test_what_a_layer_has_done(models, rule, share_mask):
    """In the order of scales and layers, once each; scores are the router's of what came in."""
    seen = Everything()
    images = generate(*models, **SMALL, selection=rule, share_mask=share_mask, observer=seen)
    assert torch.equal(images, generate(*models, **SMALL, selection=rule, share_mask=share_mask))
    assert [(r.si, r.layer) for r in seen.routed] == [(si, i) for si in SCALES for i in range(2)]
    for routed in seen.routed:
        tokens = (routed.si + 1) ** 2
        assert routed.ffn is models[0].moe.blocks[routed.layer].ffn
        assert routed.x_BLC.shape == (6, tokens, 64)
        assert routed.mask_BLE.shape == (6, tokens, 8)
        if not rule.uses_scores:
            assert routed.scores_bLE is None
            continue
        x_bLC = routed.x_BLC[: 3 if share_mask else 6]
        with torch.no_grad():
            assert torch.equal(routed.scores_bLE, routed.ffn.router(x_bLC))
        mask_bLE = rule.at(routed.layer)(routed.scores_bLE)
        assert torch.equal(routed.mask_BLE, mask_bLE.repeat(2 if share_mask else 1, 1, 1))


def test_several_are_shown_all_in_their_order(models):
    log = []
    first, second = Everything("first", log), Outside("second", log)
    generate(*models, **SMALL, tau=0.5, observer=joined(None, first, None, second))
    assert len(first.routed) == 4
    assert second.routed == []
    within = {("selection", si) for si in SCALES} | {("experts", si) for si in SCALES}
    assert set(first.parts) - set(second.parts) == within
    assert [part for part in first.parts if part not in within] == second.parts
    assert [si for si, _ in second.scales] == [0, 1, 2, 3]
    assert log[:2] == ["first", "second"]
    assert joined(None, first) is first
    assert joined(None) is None


def test_layers_call_nothing_where_nobody_looks_into_them():
    routing = Routing(Threshold(0.5), 3)
    assert routing.at(1) is routing
    outside = joined(Outside(), Outside())
    assert outside.in_layers() is None
