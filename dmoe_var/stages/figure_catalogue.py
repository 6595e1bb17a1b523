"""What each figure of the paper is made of: curves of points, and stages whose records it reads.

Legend: a need is a stage with its configuration; a curve is a list of points, each evaluated under
every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmoe_var.config.figures import FiguresConfig
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.graph import record_if_done
from dmoe_var.experiment.points import Curve, Point, operating_point, vary
from dmoe_var.experiment.work import Work
from dmoe_var.figures import calibration
from dmoe_var.models.var import VARConfig
from dmoe_var.moe.selection import RULES

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Need:
    """A stage that has to be done for a figure."""

    stage: str
    work: Work


@dataclass(frozen=True)
class Run:
    """A stage whose own record or training curve is drawn; `shade` is its place among its kind."""

    name: str
    stage: str
    changes: Changes
    shade: float | None = None
    method: str = "last"


@dataclass(frozen=True)
class Figure:
    """A figure's content. `kind` says how it is drawn (see `stages.figures`)."""

    title: str
    kind: str
    curves: Callable[[Work], list[Curve]] = lambda work: []
    runs: Callable[[Work], list[Run]] = lambda work: []

    def needs(self, work: Work) -> list[Need]:
        """All that the figure reads."""
        work = at_size(work)
        seeds = work.config.figures.used_seeds
        points = [point for curve in self.curves(work) for point in curve.points]
        evaluated = [Need("evaluate", each) for p in points for each in p.works(work, seeds)]
        return [*(Need(r.stage, vary(work, r.changes)) for r in self.runs(work)), *evaluated]


def at_size(work: Work) -> Work:
    """The work with the number of images a point that the figures want."""
    figures = work.config.figures
    return vary(work, {"evaluate.num_samples": figures.quick_samples}) if figures.quick else work


def _shades(values: Collection[Any]) -> list[float]:
    return [i / max(1, len(values) - 1) for i in range(len(values))]


def _dense(changes: Changes = {}, name: str = "dense VAR", shade: float | None = None) -> Curve:  # noqa: B006
    point = Point(name, None, {**changes, "evaluate.model": "dense"})
    return Curve(name, "dense", (point,), shade, line=False)


def _over_tau(
    work: Work,
    name: str,
    method: str,
    changes: Changes = {},  # noqa: B006
    shade: float | None = None,
    rule: str = "threshold",
) -> Curve:
    """One tau on all of `moe.scales`, a point a tau."""
    figures = work.config.figures
    fixed = {**changes, "evaluate.model": "dynamic", "selection.rule": rule}
    if RULES[rule].true_norms:  # nothing is timed, and small experts one by one are slow
        fixed["moe.impl"] = "reference"
    points = tuple(
        Point(f"{tau:g}", tau, {**fixed, "selection.tau": (tau,)})
        for tau in figures.along(figures.tau)
    )
    return Curve(name, method, points, shade)


def _chosen(work: Work) -> Curve:
    changes = {"evaluate.model": "dynamic", **operating_point(work)}
    point = Point(vary(work, changes).config.selection.text, None, changes)
    return Curve("chosen tau a scale", "chosen", (point,), line=False)


def _pruned(work: Work) -> Curve:
    figures = work.config.figures
    points = tuple(
        Point(f"{share:g}", share, {"evaluate.model": "pruned", "pruning.share": share})
        for share in figures.along(figures.pruned_shares)
    )
    return Curve("Pruned-FFN, last scales", "pruned", points)


def _main_curves(work: Work) -> list[Curve]:
    every = {"moe.scales": tuple(range(work.config.var.num_scales))}
    return [
        _dense(),
        _over_tau(work, "one tau, last scales", "last"),
        _over_tau(work, "one tau, all scales", "all", every),
        _pruned(work),
        _chosen(work),
        *_other_depths(work),
    ]


def _other_depths(work: Work) -> list[Curve]:
    """Dense models of other depths: what the same FLOPs buy without experts."""
    depths = {
        d: s for d, s in work.config.figures.depths.items() if int(d) != work.config.var.depth
    }
    return [
        _dense(_of_depth(work, int(d), source), f"dense, depth {d}", 1 - i / len(depths))
        for i, (d, source) in enumerate(depths.items())
    ]


def _single_scales(work: Work) -> list[Curve]:
    scales = sorted(work.config.figures.single_scales)
    curves = [
        _over_tau(work, f"scale {si + 1} alone", "last", {"moe.scales": (si,)}, shade)
        for si, shade in zip(scales, _shades(scales), strict=True)
    ]
    return [_dense(), *curves]


def _depths(work: Work) -> list[Curve]:
    own = {str(work.config.var.depth): work.config.base.var}
    depths = sorted({**work.config.figures.depths, **own}.items(), key=lambda item: int(item[0]))
    curves = []
    for (depth, source), shade in zip(depths, _shades(depths), strict=True):
        changes = _of_depth(work, int(depth), source)
        curves += [
            _dense(changes, f"dense, depth {depth}", shade),
            _over_tau(work, f"one tau, last scales, depth {depth}", "last", changes, shade),
        ]
    return curves


def _of_depth(work: Work, depth: int, source: str | None) -> Changes:
    """Another depth: what depth derives (width, heads, drop path, gain) is derived anew, what the
    configuration gives by itself stays."""
    var = work.config.var
    derived = VARConfig(depth=var.depth)
    anew = {
        f"var.{name}": None
        for name in ("width", "num_heads", "drop_path", "adaln_gamma_gain")
        if getattr(var, name) == getattr(derived, name)
    }
    return {"var.depth": depth, "base.var": source, "selection.layer_tau": (), **anew}


def _alphas(work: Work) -> list[Run]:
    alphas = work.config.figures.alphas
    return [
        Run(f"alpha {alpha:g}", "sparsify", {"sparsify.alpha": alpha}, shade)
        for alpha, shade in zip(alphas, _shades(alphas), strict=True)
    ]


def _all_experts_by_alpha(work: Work) -> list[Curve]:
    """The fine-tuned model with every expert, at each alpha."""
    points = tuple(
        Point(
            f"{alpha:g}",
            alpha,
            {"sparsify.alpha": alpha, "evaluate.model": "dynamic", "selection.rule": "all"},
        )
        for alpha in work.config.figures.alphas
    )
    return [_dense(), Curve("all experts", "last", points)]


def _without_relu(work: Work) -> list[Curve]:
    gelu = {"sparsify.activation": "gelu", "sparsify.alpha": work.config.figures.gelu_alpha}
    return [
        _dense(),
        _over_tau(work, "ReLU and Hoyer", "oracle", rule="oracle"),
        _over_tau(work, "ReLU alone (alpha 0)", "last", {"sparsify.alpha": 0.0}, rule="oracle"),
        _over_tau(work, "GELU and Hoyer", "all", gelu, rule="oracle"),
    ]


def _fitting_sizes(work: Work) -> tuple[int, ...]:
    """The expert sizes that divide the FFN into at least two experts."""
    hidden = work.config.var.hidden
    sizes = sorted(work.config.figures.expert_sizes)
    fitting = tuple(size for size in sizes if hidden % size == 0 and size < hidden)
    if not fitting:
        raise ConfigError(f"figures.expert_sizes={sizes}: none divides the FFN's {hidden} neurons")
    return fitting


def _sizes(work: Work) -> list[Curve]:
    sizes = _fitting_sizes(work)
    curves = [
        _over_tau(
            work, f"experts of {size}", "oracle", {"split.expert_size": size}, shade, "oracle"
        )
        for size, shade in zip(sizes, _shades(sizes), strict=True)
    ]
    return [_dense(), *curves]


def _timing(figures: FiguresConfig, tau: Sequence[float]) -> dict[str, Any]:
    return {
        "benchmark.batch_sizes": (figures.batch_size,),
        "benchmark.tau": tuple(tau),
        "benchmark.published": None,
        "benchmark.compile": "eager",
        "benchmark.chosen": False,
        "benchmark.random_masks": False,
        "benchmark.smaller": None,
    }


def _throughput(work: Work) -> list[Run]:
    changes = {**_timing(work.config.figures, ()), **operating_point(work)}
    changes |= {"benchmark.parts": True, "benchmark.chosen": True}
    return [Run("chosen tau", "benchmark", changes, method="chosen")]


def _times(work: Work) -> list[Run]:
    figures, sizes = work.config.figures, _fitting_sizes(work)
    changes = _timing(figures, figures.along(figures.time_tau))
    return [
        Run(f"experts of {size}", "benchmark", {**changes, "split.expert_size": size}, shade)
        for size, shade in zip(sizes, _shades(sizes), strict=True)
    ]


def _router_runs(work: Work) -> list[Run]:
    alphas = sorted(work.config.figures.router_alphas)
    return [
        Run(f"alpha {alpha:g}", "train_router", {"sparsify.alpha": alpha}, shade)
        for alpha, shade in zip(alphas, _shades(alphas), strict=True)
    ]


def _router_curves(work: Work) -> list[Curve]:
    alphas = sorted(work.config.figures.router_alphas)
    curves = [
        _over_tau(work, f"alpha {alpha:g}", "last", {"sparsify.alpha": alpha}, shade)
        for alpha, shade in zip(alphas, _shades(alphas), strict=True)
    ]
    return [_dense(), *curves]


def _pictures(work: Work) -> list[Run]:
    """Figure 2a: the sampling of all measurements."""
    changes = {
        "sample.model": "both",
        **operating_point(work),
        "sample.per_class": 2,
    }
    return [Run("samples", "sample", changes)]


def _fine_pictures(work: Work) -> list[Run]:
    """Figure 11: as the paper draws pictures, with more guidance and smoothing."""
    (first,) = _pictures(work)
    smooth = {"sampling.cfg": 4.0, "sampling.top_p": 0.95, "sampling.more_smooth": True}
    return [Run("samples", "sample", {**first.changes, **smooth, "sample.per_class": 3})]


def _maps(work: Work) -> list[Run]:
    return [Run("maps", "maps", operating_point(work))]


def _rules(work: Work) -> list[Curve]:
    """Every selection rule on the last scales."""
    figures = work.config.figures
    num_experts = work.config.var.hidden // work.config.split.expert_size
    counts = sorted({max(1, round(s * num_experts)) for s in figures.along(figures.k_shares)})

    def curve(name: str, rule: str, key: str, values: Sequence[float]) -> Curve:
        fixed = {"evaluate.model": "dynamic", "selection.rule": rule}
        points = tuple(Point(f"{v:g}", v, {**fixed, f"selection.{key}": v}) for v in values)
        return Curve(name, rule, points)

    return [
        _dense(),
        _over_tau(work, "Eq. 3", "last"),
        curve("top-k", "top_k", "k", counts),
        curve("cumulative share", "cumulative", "share", figures.along(figures.cumulative_shares)),
        curve("random k", "random", "k", counts),
        _over_tau(work, "oracle, Eq. 3", "oracle", rule="oracle"),
        _over_tau(work, "keys, Eq. 3", "keys", rule="keys"),
    ]


def _budgets(work: Work) -> Changes:
    return {"calibrate.budgets": work.config.figures.budgets, "calibrate.budget_ms": None}


def _calibrated(work: Work) -> list[Curve]:
    """FID at the tau that the calibration and its rivals chose; empty until it has run."""
    record = record_if_done(vary(work, _budgets(work)), "calibrate")
    if record is None:
        return []
    fixed = {"evaluate.model": "dynamic", "selection.rule": "threshold"}
    curves = [_dense()]
    for method, found in record.about["curves"].items():
        points = tuple(
            Point(
                f"{each['budget']:g}",
                each["budget"],
                {**fixed, **_as_keys(each["tau"])},
            )
            for each in found
        )
        curves.append(Curve(calibration.NAMES[method], method, points))
    return curves


def _as_keys(tau: Sequence[Any]) -> Changes:
    """A calibrated tau as configuration keys: one a scale, or one a layer of each."""
    if isinstance(tau[0], list):
        return {"selection.layer_tau": tuple(tuple(of_scale) for of_scale in tau)}
    return {"selection.tau": tuple(tau)}


def _accounting(work: Work) -> list[Curve]:
    return [_dense(), _over_tau(work, "one tau, last scales", "last"), _chosen(work)]


FIGURES: dict[str, Figure] = {
    "2a": Figure("same seeds, dense and dynamic", "grid", runs=_pictures),
    "2b": Figure("experts over the picture", "maps", runs=_maps),
    "3": Figure("the trade: FID over FLOPs", "curves", _main_curves),
    "4": Figure("experts at a single scale", "curves", _single_scales),
    "5": Figure("two depths", "curves", _depths),
    "6": Figure("fine-tuning over alpha", "alphas", _all_experts_by_alpha, _alphas),
    "7": Figure("without ReLUfication (oracle selection)", "curves", _without_relu),
    "8a": Figure("expert sizes (oracle selection)", "curves", _sizes),
    "8b": Figure("throughput by scale", "throughput", runs=_throughput),
    "9": Figure("time over tau, by expert size", "times", runs=_times),
    "10": Figure("routers under low and high alpha", "routers", _router_curves, _router_runs),
    "11": Figure("same seeds, guidance 4, smoothed", "grid", runs=_fine_pictures),
    "12": Figure("experts over the picture, several tau", "maps", runs=_maps),
    "calibration": Figure(
        "tau from a budget, and its rivals",
        "curves",
        _calibrated,
        lambda work: [Run("calibration", "calibrate", _budgets(work))],
    ),
    "accounting": Figure("what counting does to the axis", "accounting", _accounting),
    "rules": Figure("selection rules on the last scales", "curves", _rules),
}
