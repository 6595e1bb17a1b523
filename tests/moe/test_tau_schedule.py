"""tau and selection: one for all, a list for the scales with experts, a list for all scales."""

from __future__ import annotations

import pytest

from dmoe_var import Oracle, Threshold, TopK
from dmoe_var.moe.selection import SelectionConfig
from dmoe_var.moe.tau_schedule import (
    PAPER_TAU,
    check_configured,
    from_published,
    resolve_rules,
)

MOE = (7, 8, 9)


def test_published_polarity():
    assert from_published([0.81839, 0.81302, 0.78686]) == pytest.approx(PAPER_TAU, abs=1e-9)
    assert pytest.approx((0.18161, 0.18698, 0.21314)) == PAPER_TAU
    assert from_published([1.0, 0.0]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("tau", "selection", "expected"),
    [
        (0.2, None, [Threshold(0.2)] * 3),
        (0, None, [Threshold(0)] * 3),
        ((0.1, 0.2, 0.3), None, [Threshold(0.1), Threshold(0.2), Threshold(0.3)]),
        ([si / 10 for si in range(10)], None, [Threshold(0.7), Threshold(0.8), Threshold(0.9)]),
        (None, TopK(2), [TopK(2)] * 3),
        (None, [TopK(1), Oracle(0.5), TopK(1)], [TopK(1), Oracle(0.5), TopK(1)]),
        (None, [TopK(si + 1) for si in range(10)], [TopK(8), TopK(9), TopK(10)]),
    ],
)
def test_what_is_given_goes_before_the_models_own(tau, selection, expected):
    own = [TopK(4), TopK(5), TopK(6)]
    expected = dict(zip(MOE, expected, strict=True))
    assert resolve_rules(tau, selection, 10, MOE) == expected
    assert resolve_rules(tau, selection, 10, MOE, own) == expected
    assert resolve_rules(None, None, 10, MOE, own) == dict(zip(MOE, own, strict=True))


def test_scales_need_not_be_the_last():
    assert resolve_rules([0.0, 0.25, 0.5, 0.75], None, 4, (0, 2)) == {
        0: Threshold(0.0),
        2: Threshold(0.5),
    }


@pytest.mark.parametrize("moe_scales", [MOE, ()])
def test_nothing_given_is_no_routing(moe_scales):
    assert resolve_rules(None, None, 10, moe_scales) == {}


@pytest.mark.parametrize(
    ("own", "moe_scales", "message"),
    [([TopK(1)] * 4, MOE, "selection has 4 values"), (TopK(1), (), "no experts")],
)
def test_a_models_own_selection_is_checked(own, moe_scales, message):
    with pytest.raises(ValueError, match=message):
        resolve_rules(None, None, 10, moe_scales, own)


@pytest.mark.parametrize(
    ("tau", "selection", "moe_scales", "message"),
    [
        (0.1, TopK(1), MOE, "both given"),
        (0.0, None, (), "tau is given, but the model has no experts"),
        (None, TopK(1), (), "selection is given, but the model has no experts"),
        ([0.1, 0.2], None, MOE, r"tau has 2 values; it takes 1, 3 .* or 10"),
        ([], None, MOE, "tau has 0 values"),
        (None, [TopK(1)] * 4, MOE, "selection has 4 values"),
        ([0.1, 1.5, 0.1], None, MOE, "tau=1.5"),
    ],
)
def test_errors(tau, selection, moe_scales, message):
    with pytest.raises(ValueError, match=message):
        resolve_rules(tau, selection, 10, moe_scales)


LAYERS = (0.1, 0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": (0.1, 0.2, 0.3)}, None),
        ({"rule": "keys", "tau": (0.1,) * 10}, None),
        ({"layer_tau": (LAYERS,)}, None),
        ({"layer_tau": (LAYERS,) * 3}, None),
        ({"rule": "random", "k": 8}, None),
        ({"tau": (0.1, 0.2)}, r"^selection\.tau=\[0\.1, 0\.2\] must have 1, 3, 10 values$"),
        ({"layer_tau": (LAYERS,) * 2}, r"^selection\.layer_tau=.* must have 1, 3, 10 values$"),
        (
            {"layer_tau": ((0.5,),)},
            r"^selection\.layer_tau=\[\[0\.5\]\] is for 1 layers, .*more \(2",
        ),
        ({"rule": "top_k", "k": 9}, r"^selection\.k=9 must be at most 8"),
    ],
)
def test_configurations_are_checked_by_what_the_rule_reads(given, message):
    shape = {"num_scales": 10, "moe_scales": MOE, "depth": 2, "num_experts": 8}
    if message is None:
        check_configured(SelectionConfig(**given), **shape)
    else:
        with pytest.raises(ValueError, match=message):
            check_configured(SelectionConfig(**given), **shape)
