"""Make figures of FID over FLOPs of the paper's method: 3, 4, 5, 7, 8a, and how experts are
selected, tau is found and FLOPs are counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import record_if_done
from dmoe_var.experiment.points import (
    Curve,
    Point,
    dense_curve,
    operating_point,
    single,
    tau_curve,
    vary,
)
from dmoe_var.figures import fid_over_flops
from dmoe_var.figures.calibration import NAMES
from dmoe_var.figures.style import Paths
from dmoe_var.models.var import VARConfig
from dmoe_var.stages.catalogue.figure import (
    Changes,
    Claim,
    Data,
    Figure,
    StageRun,
    figure,
    fitting_sizes,
    heading,
    shades,
)

LAST_ALONE = 5
"""Scales that figure 4 compares if none are given: the last ones."""
LAST_SCALES = "the last scales are the ones to sparsify"


def draw(experiment: Experiment, data: Data, paths: Paths) -> None:
    """Plot FID over FLOPs."""
    fid_over_flops.draw(data["curves"], data["fid"], heading(data), data["note"], paths)


def draw_accounting(experiment: Experiment, data: Data, paths: Paths) -> None:
    """Plot FID over FLOPs as we and as the authors count them."""
    given = data["curves"], data["fid"], heading(data), data["note"]
    fid_over_flops.draw_accounting(*given, paths)


@figure("3")
def trade(experiment: Experiment) -> Figure:
    """Make figure 3: one tau on the last and on all scales, pruned FFNs, the chosen tau, and dense
    models of other depths, which show what the same FLOPs buy without experts."""
    figures = experiment.config.figures
    every = {"moe.scales": tuple(range(experiment.config.var.num_scales))}
    last = over_tau(experiment, "one tau, last scales", "last")
    everywhere = over_tau(experiment, "one tau, all scales", "all", every)
    shares = figures.along(figures.pruned_shares)
    changes = {"evaluate.model": "pruned"}
    pruned = along_key("Pruned-FFN, last scales", "pruned", "pruning.share", shares, changes)
    other = {d: s for d, s in figures.depths.items() if int(d) != experiment.config.var.depth}
    others = [
        dense_curve(f"dense, depth {d}", of_depth(experiment, int(d), source), 1 - i / len(other))
        for i, (d, source) in enumerate(other.items())
    ]
    claims = [
        Claim(LAST_SCALES, last.name, everywhere.name),
        Claim("routing by token beats pruning", last.name, pruned.name),
    ]
    curves = [last, everywhere, pruned, chosen_point(experiment), *others]
    return beside_dense("the trade: FID over FLOPs", curves, claims)


@figure("4")
def single_scales(experiment: Experiment) -> Figure:
    """Make figure 4: experts at one scale alone."""
    config = experiment.config
    every = range(config.var.num_scales)
    scales = sorted(config.figures.single_scales or every[-LAST_ALONE:])
    curves = [
        over_tau(experiment, f"scale {si + 1} alone", "last", {"moe.scales": (si,)}, shade)
        for si, shade in zip(scales, shades(scales), strict=True)
    ]
    *coarser, finest = curves
    claims = [Claim(LAST_SCALES, finest.name, other.name) for other in coarser]
    return beside_dense("experts at a single scale", curves, claims)


@figure("5")
def depths(experiment: Experiment) -> Figure:
    """Make figure 5: each depth beside its own dense model."""
    own = {str(experiment.config.var.depth): experiment.config.base.var}
    by_depth = sorted(
        {**experiment.config.figures.depths, **own}.items(), key=lambda item: int(item[0])
    )
    curves = []
    for (depth, source), shade in zip(by_depth, shades(by_depth), strict=True):
        changes = of_depth(experiment, int(depth), source)
        name = f"one tau, last scales, depth {depth}"
        curves.append(dense_curve(f"dense, depth {depth}", changes, shade))
        curves.append(over_tau(experiment, name, "last", changes, shade))
    shallow, deep = (f"depth {by_depth[place][0]}" for place in (0, -1))
    claim = Claim(
        "a deeper model has more to give",
        better=f"one tau, last scales, {deep}",
        worse=f"one tau, last scales, {shallow}",
        dense=(f"dense, {deep}", f"dense, {shallow}"),
    )
    claims = [claim] if deep != shallow else []
    return Figure("two depths", draw, curves=curves, claims=claims)


@figure("7")
def without_relu(experiment: Experiment) -> Figure:
    """Make figure 7: what ReLU and the Hoyer loss each give, without errors of routers."""
    config, alone = experiment.config, {"sparsify.alpha": 0.0}
    joined = {} if config.sparsify.alpha else {"sparsify.alpha": config.figures.hoyer_alpha}
    gelu = {"sparsify.activation": "gelu", "sparsify.alpha": config.figures.gelu_alpha}
    both = over_tau(experiment, "ReLU and Hoyer", "oracle", joined, rule="oracle")
    relu = over_tau(experiment, "ReLU alone (alpha 0)", "last", alone, rule="oracle")
    hoyer = over_tau(experiment, "GELU and Hoyer", "all", gelu, rule="oracle")
    claims = [
        Claim("ReLU gives more than Hoyer", relu.name, hoyer.name),
        Claim("Hoyer adds to ReLU", both.name, relu.name),
    ]
    return beside_dense("without ReLUfication (oracle selection)", [both, relu, hoyer], claims)


@figure("8a")
def sizes(experiment: Experiment) -> Figure:
    """Make figure 8a: expert sizes, without errors of routers."""
    fitting = fitting_sizes(experiment)
    curves = []
    for size, shade in zip(fitting, shades(fitting), strict=True):
        changes = {"split.expert_size": size}
        curves.append(
            over_tau(experiment, f"experts of {size}", "oracle", changes, shade, "oracle")
        )
    names = [curve.name for curve in curves]
    pairs = [*pairwise(names)]  # those far apart may share too few FLOPs
    if len(names) > 2:
        pairs.insert(0, (names[0], names[-1]))
    claims = [Claim("smaller experts are better in FID", *pair) for pair in pairs]
    return beside_dense("expert sizes (oracle selection)", curves, claims)


@figure("rules")
def rules(experiment: Experiment) -> Figure:
    """Compare every selection rule on the last scales."""
    figures = experiment.config.figures
    num_experts = experiment.config.var.hidden // experiment.config.split.expert_size
    counts = sorted({max(1, round(s * num_experts)) for s in figures.along(figures.k_shares)})
    shares = figures.along(figures.cumulative_shares)

    def curve(name: str, rule: str, key: str, values: Sequence[float]) -> Curve:
        changes = {"evaluate.model": "dynamic", "selection.rule": rule}
        return along_key(name, rule, f"selection.{key}", values, changes)

    routers, chance = (
        over_tau(experiment, "Eq. 3", "last"),
        curve("random k", "random", "k", counts),
    )
    curves = [
        routers,
        curve("top-k", "top_k", "k", counts),
        curve("cumulative share", "cumulative", "share", shares),
        chance,
        over_tau(experiment, "oracle, Eq. 3", "oracle", rule="oracle"),
        over_tau(experiment, "keys, Eq. 3", "keys", rule="keys"),
    ]
    claims = [Claim("routers beat chance", routers.name, chance.name)]
    return beside_dense("selection rules on the last scales", curves, claims)


@figure("calibration")
def calibration(experiment: Experiment) -> Figure:
    """Compare FID at tau of the calibration and its rivals. There is no curve until it has run."""
    changes = {"calibrate.budgets": experiment.config.figures.budgets, "calibrate.budget_ms": None}
    run = StageRun("calibration", "calibrate", changes)
    record = record_if_done(run.experiment(experiment), run.stage)
    fixed = {"evaluate.model": "dynamic", "selection.rule": "threshold"}
    found_by = record.about["curves"] if record else {}
    curves = [dense_curve()] if record else []
    for method, found in found_by.items():
        points = tuple(
            Point(f"{each['budget']:g}", each["budget"], {**fixed, **_as_keys(each["tau"])})
            for each in found
        )
        curves.append(Curve(NAMES[method], method, points))
    return Figure(
        "tau from a budget, and its rivals",
        draw,
        curves=curves,
        runs=[run],
        claims=[
            Claim("calibrated tau is better than tau chosen otherwise", NAMES[ours], NAMES[rival])
            for ours in ("by_layer", "calibrated")
            for rival in ("fixed", "linear", "search")
        ],
        pending="" if record else "its tau are found",
    )


@figure("accounting")
def accounting(experiment: Experiment) -> Figure:
    """Show what counting does to the axis."""
    last = over_tau(experiment, "one tau, last scales", "last")
    curves = [dense_curve(), last, chosen_point(experiment)]
    return Figure("what counting does to the axis", draw_accounting, curves=curves)


def beside_dense(title: str, curves: Sequence[Curve], claims: Sequence[Claim]) -> Figure:
    """Make a figure of FID over FLOPs, with the dense model."""
    return Figure(title, draw, curves=[dense_curve(), *curves], claims=claims)


def over_tau(
    experiment: Experiment,
    name: str,
    method: str,
    changes: Changes = {},  # noqa: B006
    shade: float | None = None,
    rule: str = "threshold",
) -> Curve:
    """Make a point for each tau of the figures."""
    figures = experiment.config.figures
    return tau_curve(name, method, figures.along(figures.tau), changes, shade, rule)


def along_key(name: str, method: str, key: str, values: Sequence[float], changes: Changes) -> Curve:
    """Make a point for each value of a key."""
    points = tuple(Point(f"{value:g}", value, {**changes, key: value}) for value in values)
    return Curve(name, method, points)


def chosen_point(experiment: Experiment) -> Curve:
    changes = {"evaluate.model": "dynamic", **operating_point(experiment)}
    label = vary(experiment, changes).config.selection.text
    return single("chosen tau a scale", "chosen", label, changes)


def of_depth(experiment: Experiment, depth: int, source: str | None) -> Changes:
    """Change the depth. What depth derives (width, heads, drop path, gain) is derived anew; what
    the configuration gives by itself stays."""
    var = experiment.config.var
    derived = VARConfig(depth=var.depth)
    anew = {
        f"var.{name}": None
        for name in ("width", "num_heads", "drop_path", "adaln_gamma_gain")
        if getattr(var, name) == getattr(derived, name)
    }
    return {"var.depth": depth, "base.var": source, "selection.layer_tau": (), **anew}


def _as_keys(tau: Sequence[Any]) -> Changes:
    """Turn calibrated tau into configuration keys: one per scale, or one per layer of each."""
    if isinstance(tau[0], list):
        return {"selection.layer_tau": tuple(tuple(of_scale) for of_scale in tau)}
    return {"selection.tau": tuple(tau)}
