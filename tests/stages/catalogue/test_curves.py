"""What the points of each curve differ in, as a command line would say it."""

from __future__ import annotations

import pytest

from dmoe_var.stages.catalogue import FIGURES

DENSE = {"evaluate.model": "dense"}


def over_tau(rule="threshold", **changes):
    """Two points of an expert model, one tau each, that differ from the experiment in `changes`."""
    fixed = {"evaluate.model": "dynamic", "selection.rule": rule, **changes}
    if rule == "oracle":
        fixed["moe.impl"] = "reference"
    return [{**fixed, "selection.tau": (tau,)} for tau in (0.0, 0.5)]


def rule(name, key, *values):
    fixed = {"evaluate.model": "dynamic", "selection.rule": name}
    return [{**fixed, f"selection.{key}": value} for value in values]


def of_depth(depth, source):
    """A dense model, alone."""
    derived = dict.fromkeys(f"var.{n}" for n in ("drop_path", "adaln_gamma_gain"))
    return {
        **DENSE, "drafter.var": None, "drafter.scales": None, "var.depth": depth,
        "base.var": source, "selection.layer_tau": (), **derived,
    }  # fmt: skip


CHOSEN = {
    "evaluate.model": "dynamic", "selection.rule": "threshold", "selection.tau": (0.3, 0.6),
}  # fmt: skip
SKIPPING = [{"sampling.skipping.ratios": (0.0, 0.0, r, r)} for r in (0.25, 0.5)]
ONE_HEAD = {"sampling.heads.measure": "bound", "sampling.heads.ratios": (0.0, 0.5, 0.5, 0.5)}
UNTUNED = {"tune_experts.steps": None, "tune_experts.epochs": None}
CURVES = {
    "skipping": {
        "dense VAR": [DENSE],
        "one tau, no token skipped": over_tau(),
        "chosen tau a scale": [CHOSEN],
        "dense, tokens skipped": [{**DENSE, **each} for each in SKIPPING],
        "chosen tau, tokens skipped": [{**CHOSEN, **each} for each in SKIPPING],
        "chosen tau, tokens skipped by router": [
            {**CHOSEN, "sampling.skipping.measure": "router", **each} for each in SKIPPING
        ],
    },
    "heads": {
        "dense VAR": [DENSE],
        "one tau, all heads": over_tau(),
        "chosen tau a scale": [CHOSEN],
        "dense, heads left out by norm": [{**DENSE, **ONE_HEAD, "sampling.heads.measure": "norm"}],
        "dense, heads left out by bound": [{**DENSE, **ONE_HEAD}],
        "chosen tau, heads left out by bound": [{**CHOSEN, **ONE_HEAD}],
    },
    "4": {
        "dense VAR": [DENSE],
        "scale 2 alone": over_tau(**{"moe.scales": (1,)}),
        "scale 4 alone": over_tau(**{"moe.scales": (3,)}),
    },
    "7": {
        "dense VAR": [DENSE],
        "ReLU and Hoyer": over_tau("oracle"),
        "ReLU alone (alpha 0)": over_tau("oracle", **{"sparsify.alpha": 0.0}),
        "GELU and Hoyer": over_tau(
            "oracle", **{"sparsify.alpha": 3e-4, "sparsify.activation": "gelu"}
        ),
    },
    "8a": {  # 100 does not divide 128, and 128 makes one expert
        "dense VAR": [DENSE],
        "experts of 32": over_tau("oracle", **{"split.expert_size": 32}),
        "experts of 64": over_tau("oracle", **{"split.expert_size": 64}),
    },
    "accounting": {
        "dense VAR": [DENSE],
        "one tau, last scales": over_tau(),
        "chosen tau a scale": [CHOSEN],
    },
    "skipped": {
        "dense VAR": [DENSE],
        "nothing": over_tau(**{"moe.skipped": "zero"}),
        "their mean": over_tau(**{"moe.skipped": "mean"}),
    },
    "conditions": {
        "dense VAR": [DENSE],
        **{
            f"routers told {words}": over_tau(**{"train_router.condition": name})
            for name, words in (
                ("none", "nothing more"),
                ("scale", "scale"),
                ("class", "class"),
                ("both", "scale and class"),
            )
        },
    },
    "tuned": {
        "dense VAR": [DENSE],
        "one tau, experts not tuned": over_tau(**UNTUNED),
        **{
            f"one tau, experts tuned at {tau}": over_tau(
                **{**UNTUNED, "tune_experts.steps": 150, "tune_experts.tau": (tau,)}
            )
            for tau in (0.4, 0.5)
        },
    },
    "drafted": {
        "dense models alone, by depth": [of_depth(1, None), of_depth(3, "three")],
        "depth 1, scales drafted by depth 3": [
            {**of_depth(1, None), "drafter.var": "three", "drafter.scales": n} for n in (1, 2, 3)
        ],
    },
    "rules": {
        "dense VAR": [DENSE],
        "Eq. 3": over_tau(),
        "top-k": rule("top_k", "k", 1, 3),
        "cumulative share": rule("cumulative", "share", 0.9),
        "random k": rule("random", "k", 1, 3),
        "oracle, Eq. 3": over_tau("oracle"),
        "keys, Eq. 3": over_tau("keys"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CURVES)
def test_curves(experiment, name):
    """Every point and no other; its value and label are what it differs in."""
    curves = FIGURES[name](experiment).curves
    found = {c.name: [dict(p.changes) for p in c.points] for c in curves}
    assert found == CURVES[name]
    for curve in curves:
        for point in curve.points:
            if point.value is not None:
                said = [v[-1] if isinstance(v, tuple) and v else v for v in point.changes.values()]
                assert point.value in said
                assert float(point.label) == point.value
    shades = [curve.shade for curve in curves if curve.shade is not None]
    assert shades == sorted(set(shades))


def test_figure_4_is_of_the_last_scales_if_none_are_given(make_experiment):
    curves = FIGURES["4"](make_experiment(edited={"figures.tau": [0.5]})).curves
    scales = [curve.points[0].changes["moe.scales"] for curve in curves[1:]]
    assert scales == [(0,), (1,), (2,), (3,)]


def test_figure_7_has_a_hoyer_loss_where_the_experiment_has_none(make_experiment):
    keys = {"sparsify.alpha": 0.0, "figures.hoyer_alpha": 5e-4, "figures.tau": [0.5]}
    curves = FIGURES["7"](make_experiment(edited=keys)).curves
    alphas = [curve.points[0].changes["sparsify.alpha"] for curve in curves[1:]]
    assert alphas == [5e-4, 0.0, 2e-4]


def test_main_curves(experiment):
    """Figure 3: dense models of other depths stand beside the experts of this one."""
    curves = {c.name: [dict(p.changes) for p in c.points] for c in FIGURES["3"](experiment).curves}
    assert curves.pop("one tau, last scales") == over_tau()
    assert curves.pop("one tau, all scales") == over_tau(**{"moe.scales": (0, 1, 2, 3)})
    assert curves.pop("Pruned-FFN, last scales") == [
        {"evaluate.model": "pruned", "pruning.share": share} for share in (0.25, 0.5)
    ]
    assert curves.pop("chosen tau a scale") == [CHOSEN]
    assert curves.pop("dense VAR") == [DENSE]
    assert list(curves) == ["dense, depth 2", "dense, depth 3"]
    (third,) = curves["dense, depth 3"]
    assert (third["var.depth"], third["base.var"], third["evaluate.model"]) == (3, "three", "dense")


def test_depths_come_with_their_own_dense_model(experiment):
    """Figure 5, in the order of depth, the experiment's own included. The deepest is compared with
    the shallowest, relative to their dense models."""
    figure = FIGURES["5"](experiment)
    (claim,), curves = figure.claims, figure.curves
    assert (claim.better, claim.worse) == (curves[-1].name, curves[1].name)
    assert claim.dense == (curves[-2].name, curves[0].name)
    kinds = ("dense", "one tau, last scales")
    names = [f"{kind}, depth {depth}" for depth in (1, 2, 3) for kind in kinds]
    assert [curve.name for curve in curves] == names
    sources = {1: experiment.config.base.var, 2: None, 3: "three"}
    for i, curve in enumerate(curves):
        (depth,) = {point.changes["var.depth"] for point in curve.points}
        assert depth == i // 2 + 1
        assert {point.changes["base.var"] for point in curve.points} == {sources[depth]}
        models = {point.changes["evaluate.model"] for point in curve.points}
        assert models == {"dynamic" if i % 2 else "dense"}
