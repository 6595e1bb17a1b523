"""Every selection rule against a loop over Python numbers.

Scores, tau and shares are multiples of 1/8, so that ties and equalities are exact.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dmoe_var import All, Cumulative, Oracle, Random, Threshold, TopK
from dmoe_var.errors import InputError
from dmoe_var.moe.selection import (
    Keys,
    LayerThreshold,
    SelectionConfig,
    SelectionRule,
    describe,
    recorded_selection,
    selection_from_json,
    selection_to_json,
)
from dmoe_var.moe.selection.rules import RULES as NAMED

E = 8
RULES = [Threshold(0.5), Oracle(0.5), TopK(3), Cumulative(0.5), Random(3), All(), Keys(0.5)]


def with_ties(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 9, (*shape, E), generator=generator) / 8


SCORES = torch.cat([with_ties(100), torch.zeros(1, E), torch.full((1, E), 0.375), torch.eye(E)])


def assert_largest(row, chosen):
    """No score left out is larger than one chosen."""
    left_out = [s for s, c in zip(row, chosen, strict=True) if not c]
    kept = [s for s, c in zip(row, chosen, strict=True) if c]
    assert not left_out or not kept or min(kept) >= max(left_out)


@pytest.mark.parametrize("rule_type", [Threshold, Oracle, Keys])
@pytest.mark.parametrize("tau", [0.0, 0.125, 0.5, 0.875, 1.0])
def test_threshold(rule_type, tau):
    for row, chosen in zip(SCORES.tolist(), rule_type(tau)(SCORES).tolist(), strict=True):
        assert chosen == [score >= tau * max(row) for score in row]


@pytest.mark.parametrize("tau", [0.125, 0.5, 1.0])
def test_keys_of_scores_with_a_sign(tau):
    """Eq. 3 where a score is positive; else the largest, and its equals, alone."""
    scores = SCORES - 0.75
    assert (scores.amax(-1) < 0).any()
    for row, chosen in zip(scores.tolist(), Keys(tau)(scores).tolist(), strict=True):
        least = tau * max(row) if max(row) > 0 else max(row)
        assert chosen == [score >= least for score in row]
        assert any(chosen)
    assert Keys(0.0)(scores).all()


@pytest.mark.parametrize("k", [1, 3, E - 1, E])
def test_top_k(k):
    for row, chosen in zip(SCORES.tolist(), TopK(k)(SCORES).tolist(), strict=True):
        assert sum(chosen) == k
        assert_largest(row, chosen)


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 0.75, 1.0])
def test_cumulative_is_the_smallest_set(share):
    for row, chosen in zip(SCORES.tolist(), Cumulative(share)(SCORES).tolist(), strict=True):
        ordered = sorted(row, reverse=True)
        smallest = next(n for n in range(1, E + 1) if sum(ordered[:n]) >= share * sum(row))
        assert sum(chosen) == smallest
        assert_largest(row, chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_share_1_leaves_out_the_zeros_alone(dtype):
    """Also where the scores' sum has to be rounded."""
    scores = torch.rand(500, E, dtype=dtype, generator=torch.Generator().manual_seed(0)).exp()
    scores[:, ::3] = 0
    assert torch.equal(Cumulative(1.0)(scores), scores > 0)


def test_random_runs_k_experts_alike_often():
    scores = torch.zeros(20000, E)
    mask = Random(3)(scores)
    assert (mask.sum(-1) == 3).all()
    share = mask.float().mean(0)  # standard error 0.0034
    assert (share - 3 / E).abs().max() < 0.015


def test_random_ignores_scores_and_follows_its_seed_or_the_noise():
    assert torch.equal(Random(3)(SCORES), Random(3, seed=0)(SCORES.flip(-1)))
    assert not torch.equal(Random(3)(SCORES), Random(3, seed=1)(SCORES))
    noise = torch.rand(5, 7, E, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Random(3)(torch.zeros(5, 7, E), noise), TopK(3)(noise))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("shape", [(), (2, 1, 3, 4), (0, 3)])
def test_any_leading_shape(rule, shape):
    scores = with_ties(*shape)
    mask = rule(scores)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    rows = rule(scores.reshape(-1, E)) if scores.numel() else scores.reshape(-1, E).bool()
    assert torch.equal(mask.reshape(-1, E), rows)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_are_pure(rule):
    scores, state = SCORES.clone(), torch.random.get_rng_state()
    assert torch.equal(rule(scores), rule(scores))
    assert rule(scores).all() == (rule == All())
    assert torch.equal(scores, SCORES)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("rule", [Threshold(0.3), TopK(2), Cumulative(0.7)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(rule, dtype):
    assert torch.equal(rule(SCORES.to(dtype)).sum(-1), rule(SCORES).sum(-1))


def test_what_a_rule_reads():
    assert [rule.name for rule in RULES if rule.true_norms] == ["oracle"]
    assert [rule.name for rule in RULES if not rule.uses_scores] == ["random", "all"]
    assert [rule.name for rule in RULES if rule.needs_router] == [
        "threshold",
        "top_k",
        "cumulative",
    ]


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        *[(Threshold, value, "is not within") for value in (-0.01, 1.01, float("nan"))],
        (Cumulative, 1.01, "is not within"),
        *[(TopK, value, "is not within") for value in (0, -1)],
        *[(Oracle, value, "must be") for value in (True, "0.5", None, [0.5], 1j)],
        *[(Random, value, "must be a whole number$") for value in (True, "2", None, 2.0)],
    ],
)
def test_wrong_values_raise(rule, value, message):
    with pytest.raises(ValueError, match=rf"^(tau|share|k)=.* {message}"):
        rule(value)


def test_rules_hold_plain_numbers():
    assert repr(TopK(np.int64(3))) == repr(TopK(3))
    assert repr(Threshold(torch.tensor(0.5))) == repr(Threshold(0.5))
    assert LayerThreshold(np.array([0.5, 1])) == LayerThreshold((0.5, 1.0))
    for taus in ((), (0.5, 1.5), (True,), 0.5, "0.5", [[0.5]]):
        with pytest.raises(ValueError, match="taus="):
            LayerThreshold(taus)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_scores_that_are_not_finite(value):
    """They decide nothing: tau 0 runs every expert, and any other rule of scores refuses."""
    scores = SCORES.clone()
    scores[5, 2] = value
    for rule in (Threshold(0), Oracle(0.0), Keys(0.0), Random(3), All()):
        mask = rule(scores)
        assert mask.all() or isinstance(rule, Random)
    for rule in (Threshold(1e-9), Oracle(0.5), TopK(3), Cumulative(0.5), Keys(0.5)):
        with pytest.raises(InputError, match="score is not finite"):
            rule(scores)


@pytest.mark.parametrize("rule_type", [TopK, Random])
def test_more_experts_than_there_are_raise(rule_type):
    with pytest.raises(ValueError, match="k=9 must be at most 8, the number of experts"):
        rule_type(E + 1)(SCORES)


GIVEN = [None, *RULES, RULES, [], Threshold(1 / 3), LayerThreshold((0.1, 0.2)), Random(2, seed=3)]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_rules_come_back_from_json(given):
    stored = json.loads(json.dumps(selection_to_json(given)))
    assert selection_from_json(stored) == given


@pytest.mark.parametrize("rule", [0.5, [0.5]], ids=str)
def test_what_is_no_plain_rule_is_not_stored(rule):
    with pytest.raises(ValueError, match="selection="):
        selection_to_json(rule)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rule": "best"}, r"selection\.rule='best' is none of threshold, oracle, .*, keys"),
        ("threshold", "none of"),
        (["threshold"], "none of"),
        ({"rule": ["all"]}, "none of"),
        ({"tau": 0.5}, "rule=None is none of"),
        ({"rule": "threshold"}, r"selection\.tau of rule threshold: Field required"),
        ({"rule": "threshold", "tau": 1.5}, r"selection\.tau of rule .* equal to 1, given 1\.5"),
        ({"rule": "layer_threshold", "taus": []}, r"selection\.taus of rule .* at least 1 item"),
        ({"rule": "threshold", "tau": True}, r"selection\.tau .*valid number"),
        ({"rule": "top_k", "k": 2.5}, r"selection\.k .*valid integer"),
        ({"rule": "random", "k": 2, "tau": 1}, r"selection\.tau .*Unexpected"),
    ],
)
def test_other_json_is_refused_in_one_line(content, message):
    with pytest.raises(ValueError, match=message) as caught:
        selection_from_json(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMED)
def test_a_rule_describes_itself(name):
    """And comes back from what configurations and stored models hold of it."""
    rule = NAMED[name]
    assert (rule.name, bool(rule.label)) == (name, True)
    given = {"rule": name, **({"layer_tau": ((0.5,),)} if name == "layer_threshold" else {})}
    found = SelectionConfig(**given)
    assert found.kind is rule
    assert type(found.rules()) is rule
    assert selection_from_json(selection_to_json(found.rules())) == found.rules()
    assert describe(found.rules())


CONFIGURED = [
    ({"tau": (0.25,)}, Threshold(0.25), "threshold 0.25", "tau 0.25"),
    ({"tau": (0.1, 0.2)}, [Threshold(0.1), Threshold(0.2)], "threshold 0.1,0.2", "tau 0.1, 0.2"),
    ({"rule": "oracle", "tau": (0.5,)}, Oracle(0.5), "oracle 0.5", "oracle tau 0.5"),
    ({"rule": "keys", "tau": (0.5, 1)}, [Keys(0.5), Keys(1)], "keys 0.5,1", "keys tau 0.5, 1"),
    ({"rule": "top_k", "k": 6}, TopK(6), "top_k 6", "top_k k 6"),
    ({"rule": "random", "k": 6}, Random(6), "random 6", "random k 6"),
    (
        {"rule": "cumulative", "share": 0.7},
        Cumulative(0.7),
        "cumulative 0.7",
        "cumulative share 0.7",
    ),
    ({"rule": "all"}, All(), "all", "all"),
    *[
        (
            {**rule, "layer_tau": ((0.1, 0.2), (0.3, 0.4))},
            [LayerThreshold((0.1, 0.2)), LayerThreshold((0.3, 0.4))],
            "threshold by layer 0.1,0.2; 0.3,0.4",
            "layer_tau 0.1, 0.2; 0.3, 0.4",
        )
        for rule in ({}, {"rule": "layer_threshold"})
    ],
]


@pytest.mark.parametrize(("given", "rules", "text", "words"), CONFIGURED)
def test_configured_rules(given, rules, text, words):
    """Also as a record's configuration has them, which may be older than some key."""
    found = SelectionConfig(**given)
    assert found.rules() == rules
    assert (found.text, describe(rules)) == (text, words)
    recorded = {f"selection.{key}": value for key, value in {"rule": "threshold", **given}.items()}
    assert recorded_selection(json.loads(json.dumps(recorded))) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "top_k", "layer_tau": ((0.5,),)}, r"layer_tau=\[\[0.5\]\] goes with rule=thr"),
        ({"rule": "layer_threshold"}, r"layer_tau=\[\] of rule=layer_threshold must hold"),
    ],
)
def test_keys_that_do_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**given)


def test_a_rule_that_selects_nothing_cannot_be_made():
    class Unfinished(SelectionRule):
        pass

    with pytest.raises(TypeError, match="__call__"):
        Unfinished()
