"""Stage: tau from a budget of FLOPs or milliseconds, verified on held-out images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from tqdm import tqdm

from dmoe_var.calibration import rivals
from dmoe_var.calibration.calibrate import Group, Losses, Plan, Taus, measure_losses, taus_for
from dmoe_var.calibration.config import CalibrateConfig
from dmoe_var.calibration.costs import CostTable, measure_costs
from dmoe_var.calibration.losses import CrossEntropy, TeacherForced
from dmoe_var.calibration.refinement import at_cost, most_losses, refine
from dmoe_var.calibration.scores import Recorder, record_scores
from dmoe_var.errors import InputError
from dmoe_var.figures import calibration as figure
from dmoe_var.metrics.flops import FlopReport, report
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.moe.selection import SelectionRule, Threshold
from dmoe_var.sampling.draw import Drawing, balanced_labels
from dmoe_var.stages import models
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.tokens import token_sets
from dmoe_var.stages.work import Work
from dmoe_var.training.distributed import from_main, is_main

ROUNDS = 2
"""Times that images are drawn to find out what a tau runs."""
HALVINGS = 40
LOSSES_FILE = "losses.jsonl"


@dataclass(frozen=True)
class Bench:
    """The models, the images, and what is measured of them."""

    work: Work

    @cached_property
    def model(self) -> DynamicVAR:
        return models.dynamic(self.work).to(self.work.config.sampling.torch_dtype)

    @cached_property
    def vqvae(self) -> Any:
        return models.vqvae(self.work).to(self.work.config.sampling.torch_dtype)

    @cached_property
    def images(self) -> tuple[TeacherForced, TeacherForced]:
        """Of the training set, and held-out ones."""
        config = self.work.config.calibrate
        counts = (config.images, config.held_out)
        sets = token_sets(self.work, self.vqvae)
        training, held_out = (
            TeacherForced(tokens, self.vqvae, count, config.batch_size)
            for tokens, count in zip(sets, counts, strict=True)
        )
        return training, held_out

    def loss(self, held_out: bool) -> CrossEntropy:
        """Cross-entropy on training images, kept beside the record, or on held-out ones."""
        folder, print_ = self.work.folder("calibrate"), self.work.fingerprint("calibrate")
        kept = None if held_out else folder / LOSSES_FILE
        impl = self.work.config.moe.impl
        by_tokens = self.work.config.calibrate.loss == "ce_tokens"
        return CrossEntropy(self.model, self.images[held_out], impl, by_tokens, kept, print_)

    @cached_property
    def plan(self) -> Plan:
        batches = [(labels, teacher) for labels, teacher, _ in self.images[0].batches()]
        cells = record_scores(self.model, batches)
        guided = self.work.config.sampling.cfg != 0
        fixed = fixed_cost(self.model, self.vqvae, guided)
        return Plan.of(fixed, cells, self.work.config.calibrate.by_layer)

    @cached_property
    def dense_gmac(self) -> float:
        guided = self.work.config.sampling.cfg != 0
        return report(fixed_cost(self.model.dense, self.vqvae, guided), {}, {}, 1).total_gmac

    def drawn(self, rules: Sequence[SelectionRule], seed: int) -> FlopReport:
        """FLOPs of images that are drawn, as many of each class."""
        config = self.work.config
        labels = balanced_labels(config.calibrate.drawn, config.var.num_classes)
        drawing = Drawing(
            self.model, self.vqvae, labels, seed, config.sampling, list(rules), config.moe.impl
        )
        pairs: dict[int, tuple[int, ...]] = dict.fromkeys(drawing.rules, ())
        for number in range(drawing.num_batches):
            for si, of_scale in drawing.batch(number).pairs.items():
                pairs[si] += tuple(of_scale)
        return report(self.plan.fixed, pairs, drawing.rules, len(labels))

    def plan_under(self, rules: Sequence[SelectionRule], seed: int) -> Plan:
        """The plan by the scores of images that are drawn under these rules."""
        recorder = Recorder(self.model, rules)
        self.drawn(recorder.rules, seed)
        return Plan.of(self.plan.fixed, recorder.tails(), self.work.config.calibrate.by_layer)


@dataclass(frozen=True)
class Found:
    """A budget's tau, and the plan that it was found by."""

    budget: float
    taus: Taus
    plan: Plan


def run(work: Work) -> StageResult:
    """Writes calibration.png where budgets are compared."""
    result = from_main(_calibrated(work) if is_main() else None)
    assert result is not None
    return result


def _calibrated(work: Work) -> StageResult:
    config = work.config.calibrate
    bench = Bench(work)
    _check_reachable(bench)
    loss = bench.loss(held_out=False)
    groups, points = len(bench.plan.tails), len(config.densities) + 1
    with tqdm(total=groups * points, desc="losses", disable=not work.progress) as bar:
        measured = partial(_training_loss, bench, loss) if config.loss != "norm" else None
        losses = measure_losses(bench.plan, config.densities, measured, bar.update)
    metrics: dict[str, float] = {"dense_gmac": bench.dense_gmac}
    about: dict[str, Any] = {"loss": config.loss, "impl": work.config.moe.impl}
    if config.budget_ms is not None:
        table = _cost_table(work, bench)
        metrics |= {"table_dense_ms": table.dense_ms, "table_fastest_ms": table.fastest_ms}
        about["cost_table"] = {"fixed_ms": table.fixed_ms, "by_scale": table.as_lists()}
        share = _share_of_time(bench, bench.plan, losses, table)
        share = _share_of_time(bench, _fit(bench, losses, share).plan, losses, table)
    else:
        share = config.budget
    found = _refined(bench, _fit(bench, losses, share), loss)
    if config.budget_ms is not None:  # as many FLOPs may take another time
        taken = partial(_ms_of, found.plan, table)
        found = replace(found, taus=at_cost(found.taus, taken, _target_ms(config, table)))
    metrics |= {"loss_evaluations": loss.count} | _verified(bench, found)
    if config.budget_ms is not None:
        metrics["predicted_ms"] = _ms_of(found.plan, table, found.taus)
        metrics |= _check_faster(work, bench, found)
    tau = found.plan.as_lists(found.taus)
    about |= {"budget": share, "tau": tau, "by_layer": config.by_layer}
    about["losses"] = [
        {"group": list(group), "tau": list(each.taus), "loss": list(each.losses)}
        for group, each in losses.items()
    ]
    if config.budgets:
        about["curves"] = _compared(work, bench, losses, loss)
        path = work.folder("calibrate") / "calibration.png"
        figure.draw(about["curves"], bench.dense_gmac, work.config.name, path)
    dtype = work.config.sampling.dtype
    return StageResult(metrics, config.drawn, about, config.seed, dtype)


def _training_loss(bench: Bench, loss: CrossEntropy, taus: Taus) -> float:
    return loss(bench.plan.rules(taus))


def _check_reachable(bench: Bench) -> None:
    """InputError for a share that no tau can reach, before anything is measured."""
    config = bench.work.config.calibrate
    low, high = (gmac / bench.dense_gmac for gmac in bench.plan.reachable())
    shares = [("budgets", share) for share in config.budgets]
    if config.budget_ms is None:
        shares.append(("budget", config.budget))
    least = math.ceil(1000 * low) / 1000  # rounded up: what is offered is then taken
    for key, share in shares:
        if share < low:
            raise InputError(
                f"calibrate.{key}={share:g}: out of reach; tau = 1 leaves {low:.3f} of the dense "
                f"model's FLOPs, tau = 0 takes {high:.3f}; allowed: {least:.3f} to 1"
            )


def _fit(bench: Bench, losses: Mapping[Group, Losses], budget: float) -> Found:
    """tau for a share of the dense FLOPs. Images are drawn under it, and their scores say better
    than teacher-forced ones what it runs."""
    plan, target = bench.plan, budget * bench.dense_gmac
    for _ in range(ROUNDS):
        rules = plan.rules(_taus(plan, losses, target, budget))
        plan = bench.plan_under(rules, bench.work.config.calibrate.seed)
    return Found(budget, _taus(plan, losses, target, budget), plan)


def _refined(bench: Bench, found: Found, loss: CrossEntropy) -> Found:
    """As many FLOPs, and a training loss no higher than that of `found` and of one tau everywhere.
    Images are drawn once more, to correct the FLOPs of the tau that moved."""
    config, plan = bench.work.config.calibrate, found.plan
    rounds = config.refinements
    if config.loss == "norm" or not rounds:
        return found
    target = found.budget * bench.dense_gmac
    one_tau = at_cost(dict.fromkeys(plan.tails, 0.5), plan.gmac, target)
    most, quiet = most_losses(len(plan.tails), rounds), not bench.work.progress
    with tqdm(total=most, desc=f"refining {found.budget:.3g}", disable=quiet) as bar:

        def measured(taus: Taus) -> float:
            bar.update()
            return loss(plan.rules(taus))

        taus = refine(plan, [found.taus, one_tau], measured, rounds)
    plan = bench.plan_under(plan.rules(taus), config.seed)
    return Found(found.budget, at_cost(taus, plan.gmac, target), plan)


def _taus(plan: Plan, losses: Mapping[Group, Losses], target: float, budget: float) -> Taus:
    try:
        return taus_for(plan, losses, target)
    except ValueError as error:
        raise InputError(f"calibrate.budget={budget:g}: out of reach ({error} GMAC)") from error


def _verified(bench: Bench, found: Found) -> dict[str, float]:
    """Predicted beside measured FLOPs, on images of another seed, and held-out cross-entropy."""
    rules = found.plan.rules(found.taus)
    predicted = found.plan.gmac(found.taus)
    counted = bench.drawn(rules, bench.work.config.calibrate.seed + 1)
    held_out = bench.loss(held_out=True)
    everything = [Threshold(0.0)] * len(rules)
    return {
        "predicted_gmac": predicted,
        "measured_gmac": counted.total_gmac,
        "measured_gmac_std": counted.total_gmac_std,
        "predicted_over_measured": predicted / counted.total_gmac,
        "measured_share": counted.total_gmac / bench.dense_gmac,
        "held_out_ce": held_out(rules),
        "held_out_ce_all_experts": held_out(everything),
    }


def _share_of_time(
    bench: Bench, plan: Plan, losses: Mapping[Group, Losses], table: CostTable
) -> float:
    """The largest share of the dense FLOPs that keeps to `budget_ms`, by the cost table.

    InputError where no tau does, or none is faster than the dense model.
    """
    config = bench.work.config.calibrate
    target = _target_ms(config, table)
    if table.fastest_ms >= target:
        raise InputError(
            f"calibrate.budget_ms={config.budget_ms:g}: out of reach on this device: a batch of "
            f"{config.time_batch} takes at least {table.fastest_ms:.1f} ms with experts, "
            f"{table.dense_ms:.1f} ms with the dense model"
        )
    low, high = plan.reachable()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _ms(plan, losses, table, middle) <= target else (low, middle)
    return low / bench.dense_gmac


def _target_ms(config: CalibrateConfig, table: CostTable) -> float:
    assert config.budget_ms is not None
    return min(config.budget_ms, table.dense_ms)


def _ms(plan: Plan, losses: Mapping[Group, Losses], table: CostTable, gmac: float) -> float:
    """Time of the tau that cost so many GMAC."""
    try:
        taus = taus_for(plan, losses, gmac)
    except ValueError:
        return table.fastest_ms
    return _ms_of(plan, table, taus)


def _ms_of(plan: Plan, table: CostTable, taus: Taus) -> float:
    """Time of these tau, as the table has it."""
    shares = {}
    for si in plan.scales:
        groups = [group for group in taus if group[0] == si]
        shares[si] = sum(plan.density(group, taus[group]) for group in groups) / len(groups)
    return table.ms(shares)


def _cost_table(work: Work, bench: Bench) -> CostTable:
    config = work.config.calibrate
    settings: dict[str, Any] = {}
    for density in (1.0, *config.densities):
        tails = [bench.plan.tails[group] for group in _by_scale(bench)]
        rules = [Threshold(each.tau(density)) for each in tails]
        settings[f"{density:g}"] = rules
    with tqdm(total=config.time_repeats + 1, desc="times", disable=not work.progress) as bar:
        return measure_costs(
            bench.model.dense,
            bench.model,
            bench.vqvae,
            _timed_labels(work),
            settings,
            config.time_repeats,
            config.seed,
            bar.update,
            impl=work.config.moe.impl,
            **_sampling(work),
        )


def _by_scale(bench: Bench) -> list[Any]:
    """One group of each scale: that scale's, or its first layer's."""
    return [next(g for g in bench.plan.tails if g[0] == si) for si in bench.plan.scales]


def _timed_labels(work: Work) -> torch.Tensor:
    labels = balanced_labels(work.config.calibrate.time_batch, work.config.var.num_classes)
    return torch.from_numpy(labels)


def _sampling(work: Work) -> dict[str, Any]:
    sampling = work.config.sampling
    return {"cfg": sampling.cfg, "top_k": sampling.top_k, "top_p": sampling.top_p}


def _check_faster(work: Work, bench: Bench, found: Found) -> dict[str, float]:
    """Times of the tau that was found and of the dense model, in turn; InputError where the dense
    model is not slower."""
    config = work.config.calibrate
    settings = {"found": found.plan.rules(found.taus)}
    table = measure_costs(
        bench.model.dense,
        bench.model,
        bench.vqvae,
        _timed_labels(work),
        settings,
        config.time_repeats,
        config.seed,
        lambda: None,
        impl=work.config.moe.impl,
        **_sampling(work),
    )
    (found_ms,) = table.whole_ms.values()
    if found_ms >= table.dense_ms:
        raise InputError(
            f"calibrate.budget_ms={config.budget_ms:g}: the tau found takes {found_ms:.1f} "
            f"ms for a batch of {config.time_batch}, the dense model {table.dense_ms:.1f} ms; none "
            "is returned"
        )
    return {"measured_ms": found_ms, "dense_ms": table.dense_ms}


def _compared(
    work: Work, bench: Bench, losses: Mapping[Group, Losses], loss: CrossEntropy
) -> dict[str, list[dict[str, Any]]]:
    """tau, predicted GMAC and held-out loss of every way to choose tau, at every budget.

    Each rival may measure as many losses as the calibration did, for all budgets together.
    """
    config, held_out = work.config.calibrate, bench.loss(held_out=True)
    budgets = sorted(config.budgets)
    scales = bench.plan.scales
    compared: dict[str, list[dict[str, Any]]] = {}

    def add(name: str, found: Found, taus: Any, rules: Sequence[SelectionRule]) -> None:
        row = {"budget": found.budget, "tau": taus, "ce": held_out(rules)}
        compared.setdefault(name, []).append(row)

    def training_loss(taus: Sequence[float]) -> float:
        return loss([Threshold(tau) for tau in taus])

    def cost_of(plan: Plan, taus: Sequence[float]) -> float:
        groups = plan.tails
        by_scale = dict(zip(scales, taus, strict=True))
        return plan.gmac({group: by_scale[group[0]] for group in groups})

    first_plan = bench.plan
    calibrated = [_refined(bench, _fit(bench, losses, budget), loss) for budget in budgets]
    groups, points = len(losses), len(config.densities) + 1
    evaluations = max(loss.count, groups * points + 1)  # "norm" measures none
    cost = partial(cost_of, first_plan)
    with tqdm(total=evaluations, desc="search", disable=not work.progress) as bar:
        trials = rivals.search(
            cost, training_loss, len(scales), evaluations, config.seed, bar.update
        )
    for found in tqdm(calibrated, desc="rivals", disable=not work.progress):
        target, cost = found.budget * bench.dense_gmac, partial(cost_of, found.plan)
        rules = found.plan.rules(found.taus)
        add("calibrated", found, found.plan.as_lists(found.taus), rules)
        chosen = {"fixed": rivals.one_tau(cost, len(scales), target)}
        tries = max(2, evaluations // len(budgets))
        chosen["linear"] = rivals.rising(cost, training_loss, len(scales), target, tries)
        priced = [replace(trial, cost=cost(trial.taus)) for trial in trials]
        best = rivals.within(priced, target)
        if best is not None:
            chosen["search"] = best.taus
        for name, taus in chosen.items():
            add(name, found, list(taus), [Threshold(tau) for tau in taus])
            compared[name][-1]["gmac"] = cost(taus)
        compared["calibrated"][-1]["gmac"] = found.plan.gmac(found.taus)
    return compared
