"""Configurations that differ in a few keys, and records joined over seeds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.points import Point, curves_of, joined, vary


def test_vary_changes_what_it_names_alone(make_experiment):
    experiment = make_experiment()
    other = vary(experiment, {"sparsify.alpha": 0.5, "moe.scales": (3,)})
    assert other.config.sparsify.alpha == 0.5
    assert other.config.moe.scales == (3,)
    back = {
        "sparsify.alpha": experiment.config.sparsify.alpha,
        "moe.scales": experiment.config.moe.scales,
    }
    assert vary(other, back) == experiment
    assert other.folder("evaluate") != experiment.folder("evaluate")


def test_vary_is_what_the_command_line_would_be(make_experiment):
    changes = {"split.expert_size": 64, "evaluate.seed": 4}
    assert vary(make_experiment(), changes).config == make_experiment(changes=changes).config


@pytest.mark.parametrize("key", ["sparsify.alfa", "nothing", "seed.x"])
def test_vary_refuses_unknown_keys(make_experiment, key):
    with pytest.raises(ConfigError, match=key):
        vary(make_experiment(), {key: 1})


def test_vary_changes_all_at_once(make_experiment):
    """Each alone would be refused: eight of four experts."""
    changed = vary(
        make_experiment(), {"selection.rule": "top_k", "selection.k": 2}
    ).config.selection
    assert (changed.rule, changed.k) == ("top_k", 2)


def test_vary_checks_what_belongs_together(make_experiment):
    with pytest.raises(ConfigError, match="expert_size"):
        vary(make_experiment(), {"split.expert_size": 48})


def test_seeds_of_a_point(make_experiment):
    point = Point("x", None, {"selection.tau": (0.5,)})
    works = [point.experiment(make_experiment(), seed) for seed in (3, 5)]
    assert [each.config.evaluate.seed for each in works] == [3, 5]
    assert {each.config.selection.tau for each in works} == {(0.5,)}


def record(variant, fid, gmac, **more):
    metrics = {"fid_x": fid, "flops_gmac": gmac, "flops_gmac_std": 0.5, **more}
    return SimpleNamespace(metrics=metrics, about={"fidelity": "fid_x"}, variant=variant)


def test_joined():
    row = joined([record("a", 1.0, 4.0), record("b", 3.0, 6.0)])
    assert row["fid_std"] == pytest.approx(2**0.5)
    places = ["evaluate/a", "evaluate/b"]
    expected = {"fid_mean": 2, "fid_by_seed": [1, 3], "flops_gmac": 5, "points": places}
    assert {key: row[key] for key in expected} == expected
    assert "flops_gmac_authors" not in row
    one = joined([record("a", 1.0, 4.0, flops_gmac_authors=2.0)])
    assert (one["fid_std"], one["flops_gmac_authors"]) == (0, 2)


def test_joined_measures_are_those_of_every_seed():
    """Means of what all records have; what a single one has is nobody's mean."""
    first = record("a", 1.0, 4.0, label_agreement=0.5, experts_share_scale2=0.25, recall=0.5)
    row = joined([first, record("b", 3.0, 6.0, label_agreement=1.0, experts_share_scale2=0.75)])
    assert (row["label_agreement"], row["experts_share_scale2"]) == (0.75, 0.5)
    assert "recall" not in row


def test_curves_of_a_sweep_are_its_groups():
    """Lists that are not chosen are one curve, whatever stands between them."""
    groups = ("dense", "last", "lists", "chosen", "lists")
    settings = [{"group": group, "label": str(i)} for i, group in enumerate(groups)]
    found = {c["name"]: (c["line"], [r["label"] for r in c["rows"]]) for c in curves_of(settings)}
    assert found == {
        "dense VAR": (False, ["0"]),
        "one tau, last scales": (True, ["1"]),
        "tau a scale": (False, ["2", "4"]),
        "operating point": (False, ["3"]),
    }
