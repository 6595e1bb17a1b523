"""Find tau for a budget of FLOPs or milliseconds, and verify it on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from dmoe_var.calibration import rivals
from dmoe_var.calibration.calibrate import Plan, Taus, taus_for
from dmoe_var.calibration.costs import CostTable, measure_costs
from dmoe_var.calibration.refinement import at_cost
from dmoe_var.calibration.scores import ROUTERS, record_scores
from dmoe_var.calibration.temperature import temperatures
from dmoe_var.config.root import Config
from dmoe_var.distributed import from_main, is_main
from dmoe_var.errors import ConfigError, InputError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.figures import calibration as figure
from dmoe_var.models.guidance import strengths
from dmoe_var.moe.selection import Oracle, Selection, SelectionRule, Threshold
from dmoe_var.sampling.draw import balanced_labels
from dmoe_var.stages.parts import loaded, skipping
from dmoe_var.stages.parts.calibration_bench import Calibration, CalibrationBench, Found
from dmoe_var.stages.parts.loaded import needs_experts
from dmoe_var.stages.parts.on_device import check_sampling

HALVINGS = 40  # of the range of GMAC, until 2^-40 of it is left


def run(experiment: Experiment) -> StageResult:
    """Calibrate tau, and write calibration.png if budgets are compared."""
    return from_main(_calibrated(experiment) if is_main() else StageResult({}))


def _calibrated(experiment: Experiment) -> StageResult:
    config = experiment.config.calibrate
    bench = CalibrationBench(experiment)
    calibration = Calibration(bench, config.by_layer)
    _check_reachable(calibration)
    metrics: dict[str, float] = {"dense_gmac": bench.dense_gmac}
    about: dict[str, Any] = {"loss": config.loss, "impl": experiment.config.moe.impl}
    if config.budget_ms is None:
        found = calibration.find(config.budget)
    else:
        table = _cost_table(calibration)
        metrics |= {"table_dense_ms": table.dense_ms, "table_fastest_ms": table.fastest_ms}
        about["cost_table"] = {"fixed_ms": table.fixed_ms, "by_scale": table.as_lists()}
        found = _found_for_time(calibration, table)
    metrics |= {"loss_evaluations": bench.training_loss.count} | _verified(bench, found)
    if config.budget_ms is not None:
        metrics["predicted_ms"] = _ms_of(found.plan, table, found.taus)
        metrics |= _check_faster(bench, found)
    tau = found.plan.as_lists(found.taus)
    about |= {"budget": found.budget, "tau": tau, "by_layer": config.by_layer}
    if config.temperature:
        sampling, impl = experiment.config.sampling, experiment.config.moe.impl
        guided_S = strengths(sampling.cfg, bench.model.config.num_scales)
        given = (bench.images[0], found.rules, guided_S, impl, sampling.share_mask)
        about["temperature"] = list(temperatures(bench.model, *given))
    about["losses"] = [
        {"group": list(group), "tau": list(each.taus), "loss": list(each.losses)}
        for group, each in calibration.losses.items()
    ]
    if config.budgets:
        about["curves"] = _compared(calibration)
        path = experiment.folder("calibrate") / "calibration.png"
        figure.draw(about["curves"], bench.dense_gmac, experiment.config.name, path)
    dtype = experiment.config.sampling.dtype
    return StageResult(metrics, config.drawn, about, config.seed, dtype)


def _check_reachable(calibration: Calibration) -> None:
    """Raise InputError for a share that no tau can reach, before anything is measured."""
    config, dense_gmac = calibration.bench.config, calibration.bench.dense_gmac
    low, high = (gmac / dense_gmac for gmac in calibration.plan.reachable())
    shares = [("budgets", share) for share in config.budgets]
    if config.budget_ms is None:
        shares.append(("budget", config.budget))
    least = math.ceil(1000 * low) / 1000  # rounded up, so that the offer is accepted
    for key, share in shares:
        if share < low:
            raise InputError(
                f"calibrate.{key}={share:g}: out of reach; tau = 1 leaves {low:.3f} of the dense "
                f"model's FLOPs, tau = 0 takes {high:.3f}; allowed: {least:.3f} to 1"
            )


def _verified(bench: CalibrationBench, found: Found) -> dict[str, float]:
    """Measure FLOPs on images of another seed, beside the predicted, and held-out cross-entropy. It
    is told in steps: the dense model, every expert, as many as run by true norms, those that do."""
    predicted = found.plan.gmac(found.taus)
    counted = bench.drawn(found.rules, bench.config.seed + 1)
    everything = [Threshold(0.0)] * len(found.rules)
    return {
        "predicted_gmac": predicted,
        "measured_gmac": counted.total_gmac,
        "measured_gmac_std": counted.total_gmac_std,
        "predicted_over_measured": predicted / counted.total_gmac,
        "measured_share": counted.total_gmac / bench.dense_gmac,
        "held_out_ce": bench.held_out_loss(found.rules),
        "held_out_ce_dense": bench.held_out_loss.dense(),
        "held_out_ce_all_experts": bench.held_out_loss(everything),
        "held_out_ce_oracle": bench.held_out_loss(_by_true_norms(bench, found)),
    }


def _by_true_norms(bench: CalibrationBench, found: Found) -> list[SelectionRule]:
    """Find the oracle's tau for each scale that run as many experts on the held-out images."""
    batches = [(labels, teacher) for labels, teacher, _ in bench.images[1].batches()]
    by_layer = len(next(iter(found.taus))) == 2
    predicted, true = (
        Plan.of(bench.fixed, record_scores(bench.model, batches, rule), by_layer=each)
        for rule, each in ((ROUTERS, by_layer), (Oracle(0.0), False))
    )
    densities = predicted.scale_densities(found.taus)
    return [Oracle(true.tails[si,].tau(density)) for si, density in densities.items()]


def _found_for_time(calibration: Calibration, table: CostTable) -> Found:
    """Find the tau that take `budget_ms` by the cost table. A share of the FLOPs comes first; its
    tau are then fitted to the time, as equal FLOPs may take different times.

    Raise InputError if no tau does, or none is faster than the dense model.
    """
    config = calibration.bench.config
    assert config.budget_ms is not None
    target = min(config.budget_ms, table.dense_ms)
    if table.fastest_ms >= target:
        raise InputError(
            f"calibrate.budget_ms={config.budget_ms:g}: out of reach on this device: a batch of "
            f"{config.time_batch} takes at least {table.fastest_ms:.1f} ms with experts, "
            f"{table.dense_ms:.1f} ms with the dense model"
        )
    share = _share_of_time(calibration, calibration.plan, table, target)
    share = _share_of_time(calibration, calibration.add_up(share).plan, table, target)
    found = calibration.find(share)
    try:
        taus = at_cost(found.taus, partial(_ms_of, found.plan, table), target)
    except ValueError as error:
        wanted = f"calibrate.budget_ms={config.budget_ms:g}"
        raise InputError(f"{wanted}: out of reach ({error} ms)") from error
    return replace(found, taus=taus)


def _share_of_time(
    calibration: Calibration, plan: Plan, table: CostTable, target_ms: float
) -> float:
    """Find the largest share of the dense FLOPs that keeps to the time by the cost table."""
    low, high = plan.reachable()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            fits = _ms_of(plan, table, taus_for(plan, calibration.losses, middle)) <= target_ms
        except ValueError:  # no tau costs as little
            fits = True
        low, high = (middle, high) if fits else (low, middle)
    return low / calibration.bench.dense_gmac


def _ms_of(plan: Plan, table: CostTable, taus: Taus) -> float:
    """Look up the milliseconds of these tau in the table."""
    return table.ms(plan.scale_densities(taus))


def _cost_table(calibration: Calibration) -> CostTable:
    """Time every scale at each of `densities`, with one tau per scale."""
    config, plan = calibration.bench.config, calibration.plan
    # A scale's own group, or its first layer's: the table counts what ran.
    groups = [next(group for group in plan.tails if group[0] == si) for si in plan.scales]
    settings: dict[str, Selection] = {
        f"{density:g}": [Threshold(plan.tails[group].tau(density)) for group in groups]
        for density in (1.0, *config.densities)
    }
    progress = calibration.bench.experiment.progress
    with tqdm(total=config.time_repeats + 1, desc="times", disable=not progress) as bar:
        return _timed(calibration.bench, settings, bar.update)


def _timed(
    bench: CalibrationBench, settings: Mapping[str, Selection], progress: Callable[[], object]
) -> CostTable:
    """Time the dense model and every setting in turn, as images are sampled."""
    config, sampling = bench.config, bench.experiment.config.sampling
    labels = balanced_labels(config.time_batch, bench.experiment.config.var.num_classes)
    return measure_costs(
        bench.model.dense,
        bench.model,
        bench.vqvae,
        torch.from_numpy(labels),
        settings,
        config.time_repeats,
        config.seed,
        progress,
        impl=bench.experiment.config.moe.impl,
        **sampling.options,
    )


def _check_faster(bench: CalibrationBench, found: Found) -> dict[str, float]:
    """Time the tau that was found and the dense model in turn. Raise InputError if the dense model
    is not slower."""
    table = _timed(bench, {"found": found.rules}, lambda: None)
    (found_ms,) = table.whole_ms.values()
    if found_ms >= table.dense_ms:
        raise InputError(
            f"calibrate.budget_ms={bench.config.budget_ms:g}: the tau found takes {found_ms:.1f} "
            f"ms for a batch of {bench.config.time_batch}, the dense model {table.dense_ms:.1f} "
            "ms; none is returned"
        )
    return {"measured_ms": found_ms, "dense_ms": table.dense_ms}


def _compared(calibration: Calibration) -> dict[str, list[dict[str, Any]]]:
    """Compare ways to choose tau at every budget by tau, predicted GMAC and held-out loss: the
    calibration, beside one with a tau per scale also one with a tau per layer, and the rivals.

    Each rival may measure as many losses as the calibration did, for all budgets together.
    """
    bench = calibration.bench
    config, loss = bench.config, bench.training_loss
    scales, budgets = calibration.plan.scales, sorted(config.budgets)

    def row(found: Found, taus: Any, gmac: float, rules: Sequence[SelectionRule]) -> dict[str, Any]:
        ce = bench.held_out_loss(rules)
        return {"budget": found.budget, "tau": taus, "gmac": gmac, "ce": ce}

    def training_loss(taus: Sequence[float]) -> float:
        return loss([Threshold(tau) for tau in taus])

    def cost_of(plan: Plan, taus: Sequence[float]) -> float:
        by_scale = dict(zip(scales, taus, strict=True))
        return plan.gmac({group: by_scale[group[0]] for group in plan.tails})

    # Calibrate each budget
    ours = [calibration.find(budget) for budget in budgets]
    groups, points = len(calibration.plan.tails), len(config.densities) + 1
    evaluations = max(loss.count, groups * points + 1)  # "norm" measures none
    found_by = {"by_layer" if calibration.by_layer else "calibrated": ours}
    if not calibration.by_layer:
        by_layer = Calibration(bench, by_layer=True)
        found_by["by_layer"] = [by_layer.find(budget) for budget in budgets]
    compared: dict[str, list[dict[str, Any]]] = {
        method: [
            row(each, each.plan.as_lists(each.taus), each.plan.gmac(each.taus), each.rules)
            for each in of_method
        ]
        for method, of_method in found_by.items()
    }
    # Search, then rivals
    first_cost, quiet = partial(cost_of, calibration.plan), not bench.experiment.progress
    with tqdm(total=evaluations, desc="search", disable=quiet) as bar:
        trials = rivals.search(
            first_cost, training_loss, len(scales), evaluations, config.seed, bar.update
        )
    for found in tqdm(ours, desc="rivals", disable=quiet):
        target, cost = found.budget * bench.dense_gmac, partial(cost_of, found.plan)
        chosen = {"fixed": rivals.one_tau(cost, len(scales), target)}
        tries = max(2, evaluations // len(budgets))
        chosen["linear"] = rivals.rising(cost, training_loss, len(scales), target, tries)
        priced = [replace(trial, cost=cost(trial.taus)) for trial in trials]
        best = rivals.within(priced, target)
        if best is not None:
            chosen["search"] = best.taus
        for method, taus in chosen.items():
            rules = [Threshold(tau) for tau in taus]
            compared.setdefault(method, []).append(row(found, list(taus), cost(taus), rules))
    return compared


def refuse(config: Config) -> None:
    """Raise ConfigError for budgets that cannot be compared, for means of skipped experts, which
    every tau that is tried would need anew, and for sampling that tau cannot be calibrated for."""
    rivals.check(config.calibrate.budgets)
    if config.moe.skipped == "mean":
        raise ConfigError("moe.skipped=mean: tau is calibrated without means; allowed here: zero")
    skipping.refuse(config, "losses are measured under teacher forcing, which skips nothing")
    loaded.refuse_drafter(config, "tau is calibrated for a model that draws every scale")
    loaded.refuse_int8(config, "tau is calibrated in floats")
    if config.calibrate.budget_ms is not None and config.sampling.cuda_graphs:
        raise ConfigError(
            "sampling.cuda_graphs=true: calibrate.budget_ms times samplers without; allowed: false"
        )
    check_sampling(config)


STAGE = Stage(
    "calibrate",
    run,
    reads=("moe", "sampling", "calibrate"),
    needs=needs_experts,
    one_process=True,
    reads_pictures=True,
    always_runs=lambda config: config.calibrate.budget_ms is not None,  # it times this very machine
    refuse=refuse,
)
