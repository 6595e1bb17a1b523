"""Make figures of FID over FLOPs of what goes beyond the paper, one technique each."""

from __future__ import annotations

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import Curve, Point, dense_curve, operating_point
from dmoe_var.models.guidance import by_scale
from dmoe_var.models.head_skipping import HeadSkipping
from dmoe_var.stages.catalogue.curves import (
    along_key,
    beside_dense,
    chosen_point,
    draw,
    of_depth,
    over_tau,
)
from dmoe_var.stages.catalogue.figure import Changes, Claim, Figure, figure, shades


@figure("skipped")
def skipped(experiment: Experiment) -> Figure:
    """Compare experts whose mean output stands for them when they do not run, with nothing."""
    nothing, means = (
        over_tau(experiment, name, "last", {"moe.skipped": what}, shade)
        for name, what, shade in (("nothing", "zero", 0.3), ("their mean", "mean", 1.0))
    )
    claim = Claim("the mean of skipped experts is better than nothing", means.name, nothing.name)
    return beside_dense("what stands for skipped experts", [nothing, means], [claim])


@figure("drafted")
def drafted(experiment: Experiment) -> Figure:
    """Compare the shallowest dense model after scales drafted by the deepest, for every number of
    them, with the two alone."""
    config = experiment.config
    sources = {int(depth): source for depth, source in config.figures.depths.items()}
    sources[config.var.depth] = config.base.var
    shallow, deep = min(sources), max(sources)
    if shallow == deep or sources[deep] is None:
        raise ConfigError(
            f"figure=drafted needs a deeper model that is given: figures.depths={sources}"
        )
    dense = {"evaluate.model": "dense", "drafter.var": None, "drafter.scales": None}
    alone = [
        Point(str(depth), depth, {**dense, **of_depth(experiment, depth, sources[depth])})
        for depth in (shallow, deep)
    ]
    refiner = {**alone[0].changes, "drafter.var": sources[deep]}
    numbers = range(1, config.var.num_scales)
    name = f"depth {shallow}, scales drafted by depth {deep}"
    ours = along_key(name, "drafted", "drafter.scales", numbers, refiner)
    theirs = Curve("dense models alone, by depth", "dense", tuple(alone))
    claim = Claim("drafting is better than a dense model of as many FLOPs", ours.name, theirs.name)
    return Figure("drafter and refiner", draw, curves=[theirs, ours], claims=[claim])


@figure("guidance")
def guidance(experiment: Experiment) -> Figure:
    """Compare guidance at every scale with none at the last three, with experts and without."""
    num_scales = experiment.config.var.num_scales
    if num_scales < 3:
        raise ConfigError(f"figure=guidance needs 3 scales or more, the model has {num_scales}")
    cfg_S = by_scale(experiment.config.sampling.cfg, num_scales)
    early = {"sampling.cfg": (*cfg_S[:-3], 0.0, 0.0, 0.0)}
    always = over_tau(experiment, "one tau, guided at every scale", "last", {}, 0.5)
    ends = over_tau(experiment, "one tau, unguided at the last three", "last", early, 1.0)
    claim = Claim("the last three scales need no guidance", better=ends.name, worse=always.name)
    dense = dense_curve("dense, unguided at the last three", early, 0.5)
    return beside_dense("where guidance ends", [dense, always, ends], [claim])


@figure("skipping")
def skipping(experiment: Experiment) -> Figure:
    """Skip tokens at the last two scales, in the dense model and beside the chosen experts."""
    config, figures = experiment.config, experiment.config.figures
    num_scales = config.var.num_scales
    if num_scales < 3:
        raise ConfigError(f"figure=skipping needs 3 scales or more, the model has {num_scales}")
    early = (0.0,) * (num_scales - 2)
    chosen = {"evaluate.model": "dynamic", **operating_point(experiment)}
    by_router = {**chosen, "sampling.skipping.measure": "router"}

    def curve(name: str, method: str, changes: Changes, shade: float) -> Curve:
        points = tuple(
            Point(f"{r:g}", r, {**changes, "sampling.skipping.ratios": (*early, r, r)})
            for r in figures.along(figures.skipped)
        )
        return Curve(name, method, points, shade)

    alone = over_tau(experiment, "one tau, no token skipped", "last")
    both = curve("chosen tau, tokens skipped", "chosen", chosen, 0.6)
    curves = [
        alone,
        chosen_point(experiment),
        curve("dense, tokens skipped", "dense", {"evaluate.model": "dense"}, 0.2),
        both,
    ]
    if {num_scales - 2, num_scales - 1} <= {*config.moe.scales}:
        curves.append(curve("chosen tau, tokens skipped by router", "chosen", by_router, 1.0))
    claims = [
        Claim("skipped tokens cost less than skipped experts", better.name, alone.name)
        for better in curves[2:4]
    ]
    return beside_dense("tokens skipped at the last two scales", curves, claims)


@figure("heads")
def heads(experiment: Experiment) -> Figure:
    """Leave out heads at the last three scales: in the dense model by either measure, and beside
    the chosen experts."""
    config, figures = experiment.config, experiment.config.figures
    num_scales, H = config.var.num_scales, config.var.H
    if num_scales < 4:
        raise ConfigError(f"figure=heads needs 4 scales or more, the model has {num_scales}")
    shares = {HeadSkipping((share,)).num_kept(0, H): share for share in figures.heads[::-1]}
    shares.pop(H, None)
    if not shares:
        raise ConfigError(
            f"figures.heads={list(figures.heads)}: none leaves out one of {H} heads (var.num_heads)"
        )
    along = figures.along(tuple(sorted(shares.values())))
    early = (0.0,) * (num_scales - 3)
    dense = {"evaluate.model": "dense"}
    chosen = {"evaluate.model": "dynamic", **operating_point(experiment)}

    def curve(name: str, method: str, measure: str, changes: Changes, shade: float) -> Curve:
        by = {**changes, "sampling.heads.measure": measure}
        points = tuple(
            Point(f"{r:g}", r, {**by, "sampling.heads.ratios": (*early, r, r, r)}) for r in along
        )
        return Curve(name, method, points, shade)

    alone = over_tau(experiment, "one tau, all heads", "last")
    without = [
        curve("dense, heads left out by norm", "dense", "norm", dense, 0.2),
        curve("dense, heads left out by bound", "dense", "bound", dense, 0.5),
        curve("chosen tau, heads left out by bound", "chosen", "bound", chosen, 1.0),
    ]
    claims = [
        Claim("heads left out cost less than skipped experts", better.name, alone.name)
        for better in without
    ]
    curves = [alone, chosen_point(experiment), *without]
    return beside_dense("heads left out at the last three scales", curves, claims)


@figure("conditions")
def conditions(experiment: Experiment) -> Figure:
    """Compare routers that are told nothing beside the token with those that are told more."""
    told = {"none": "nothing more", "scale": "scale", "class": "class", "both": "scale and class"}
    curves = [
        over_tau(
            experiment, f"routers told {words}", "last", {"train_router.condition": name}, shade
        )
        for (name, words), shade in zip(told.items(), shades(told), strict=True)
    ]
    plain, *others = curves
    claims = [Claim("routers should know more", better=c.name, worse=plain.name) for c in others]
    return beside_dense("what routers are told", curves, claims)


@figure("tuned")
def tuned(experiment: Experiment) -> Figure:
    """Compare experts that trained under the mask of one tau with those that never saw a mask."""
    figures = experiment.config.figures
    off = {"tune_experts.steps": None, "tune_experts.epochs": None}
    plain = over_tau(experiment, "one tau, experts not tuned", "last", off, 0.0)
    curves = [
        over_tau(
            experiment,
            f"one tau, experts tuned at {tau:g}",
            "last",
            {**off, "tune_experts.steps": figures.tuned_steps, "tune_experts.tau": (tau,)},
            (1 + i) / len(figures.tuned_tau),
        )
        for i, tau in enumerate(figures.tuned_tau)
    ]
    claims = [Claim("tau belongs in the loss", better=c.name, worse=plain.name) for c in curves]
    return beside_dense("experts that train under the mask", [plain, *curves], claims)
