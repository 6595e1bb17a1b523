"""Compare what goes beyond the paper: each technique alone, all joined, and all but one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.points import Curve, Point, dense_curve, operating_point, tau_curve
from dmoe_var.figures import fid_over_flops
from dmoe_var.figures.style import Paths
from dmoe_var.files import write_text
from dmoe_var.models.guidance import by_scale
from dmoe_var.stages.catalogue.curves import of_depth
from dmoe_var.stages.catalogue.figure import (
    Changes,
    Claim,
    Data,
    Figure,
    figure,
    heading,
)

SKIPPED = 0.4
"""Share of the tokens that are skipped at the last two scales."""
LEFT_OUT = 0.5
"""Share of the heads that are left out at the last three scales."""
PLAIN, JOINED, ABLATED = "experts alone", "all joined", "all but the one named, chosen tau"
TABLE = """\
| | tau, or what is missing | GMAC per image | saved | {fid} | agreement | ms per image |
|---|---|---|---|---|---|---|
{rows}
"""


def techniques_of(experiment: Experiment) -> dict[str, Changes]:
    """Name the techniques with the keys that each one sets."""
    config, figures = experiment.config, experiment.config.figures
    num_scales = config.var.num_scales
    cfg_S = by_scale(config.sampling.cfg, num_scales)
    return {
        "guidance ends": {"sampling.cfg": (*cfg_S[:-3], 0.0, 0.0, 0.0)},
        "means of skipped experts": {"moe.skipped": "mean"},
        "tokens skipped": {
            "sampling.skipping.ratios": (*(0.0,) * (num_scales - 2), SKIPPED, SKIPPED)
        },
        "heads left out": {
            "sampling.heads.ratios": (*(0.0,) * (num_scales - 3), *(LEFT_OUT,) * 3),
            "sampling.heads.measure": "bound",
        },
        "routers told scale and class": {"train_router.condition": "both"},
        "tau in the loss": {
            "tune_experts.steps": figures.tuned_steps,
            "tune_experts.tau": figures.tuned_tau[:1],
        },
    }


@figure("techniques")
def techniques(experiment: Experiment) -> Figure:
    """Compare techniques over FLOPs and over time, beside dense models of other depths."""
    config, figures = experiment.config, experiment.config.figures
    if config.var.num_scales < 4:
        raise ConfigError(
            f"figure=techniques needs 4 scales or more, the model has {config.var.num_scales}"
        )
    known = techniques_of(experiment)
    tau = figures.along(figures.tau)
    together = _merged(known)
    chosen = {"evaluate.model": "dynamic", **operating_point(experiment)}
    alone = [tau_curve(name, name, tau, changes) for name, changes in known.items()]
    missing = (Point(name, None, {**chosen, **_merged(known, name)}) for name in known)
    ablated = Curve(ABLATED, "lists", tuple(missing), line=False)
    plain = tau_curve(PLAIN, "last", tau)
    joined = tau_curve(JOINED, "chosen", tau, together)
    others = [
        dense_curve(f"dense, depth {depth}", of_depth(experiment, int(depth), source), 0.5)
        for depth, source in figures.depths.items()
        if int(depth) != config.var.depth
    ]
    unguided = dense_curve("dense, guidance ends", known["guidance ends"], 0.0)
    claims = [Claim(f"{c.name} pays", better=c.name, worse=PLAIN) for c in (*alone, joined)]
    curves: list[Curve] = [dense_curve(), unguided, *others, plain, *alone, joined, ablated]
    return Figure("techniques beyond the paper", draw, curves=curves, claims=claims)


def _merged(known: Mapping[str, Changes], left_out: str = "") -> dict[str, Any]:
    """Join the keys of all techniques but one."""
    return {k: v for name, changes in known.items() if name != left_out for k, v in changes.items()}


def draw(experiment: Experiment, data: Data, paths: Paths) -> None:
    """Plot FID over FLOPs and over time, and write the same as a table beside it."""
    curves = data["curves"]
    fid_over_flops.draw_over_time(curves, data["fid"], heading(data), data["note"], paths)
    first = paths if not isinstance(paths, Sequence) else paths[0]
    write_text(first.with_suffix(".md"), table(curves, data["fid"]))


def table(curves: Sequence[Mapping[str, Any]], fid: str) -> str:
    """Write a row per point; the first curve is the dense model that FLOPs are compared with."""
    dense_gmac = curves[0]["rows"][0]["flops_gmac"]
    rows = []
    for curve in curves:
        for row in curve["rows"]:
            of_curve = "-" if row["label"] == curve["name"] else row["label"]
            agreement = row.get("label_agreement")
            rows.append(
                f"| {curve['name']} | {of_curve} | {row['flops_gmac']:.4f} "
                f"| {1 - row['flops_gmac'] / dense_gmac:.1%} "
                f"| {row['fid_mean']:.1f} ± {row['fid_std']:.1f} "
                f"| {'-' if agreement is None else f'{agreement:.1%}'} "
                f"| {row['sampling_ms_per_image']:.1f} |"
            )
    return TABLE.format(fid=fid_over_flops.display_name(fid), rows="\n".join(rows))
