"""Hold what a calibration measures with (models, images, losses, samples), and find tau with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from tqdm import tqdm

from dmoe_var.calibration.calibrate import Group, Losses, Plan, Taus, measure_losses, taus_for
from dmoe_var.calibration.losses import CrossEntropy, TeacherForced
from dmoe_var.calibration.refinement import at_cost, most_losses, refine
from dmoe_var.calibration.scores import Cell, Recorder, Tails, record_scores
from dmoe_var.config.stages import CalibrateConfig
from dmoe_var.errors import InputError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.metrics.flops import FlopReport, report
from dmoe_var.metrics.flops_fixed import FixedCost, fixed_cost
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.moe.counts import ExpertHistogram
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.selection import SelectionRule
from dmoe_var.sampling.draw import Drawing, balanced_labels
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import token_sets

ROUNDS = 2
"""Times that images are sampled to find out what a tau runs."""
LOSSES_FILE = "losses.jsonl"


@dataclass(frozen=True)
class CalibrationBench:
    """The models, the images, and what is measured of them."""

    experiment: Experiment

    @property
    def config(self) -> CalibrateConfig:
        return self.experiment.config.calibrate

    @cached_property
    def model(self) -> DynamicVAR:
        return loaded.dynamic(self.experiment).to(self.experiment.config.sampling.torch_dtype)

    @cached_property
    def vqvae(self) -> Any:
        return loaded.vqvae(self.experiment).to(self.experiment.config.sampling.torch_dtype)

    @cached_property
    def images(self) -> tuple[TeacherForced, TeacherForced]:
        """Images of the training set, and held-out ones."""
        counts = (self.config.images, self.config.held_out)
        sets = token_sets(
            self.experiment, loaded.vqvae(self.experiment)
        )  # float32, whatever dtype samples
        training, held_out = (
            TeacherForced(tokens, self.vqvae, count, self.config.batch_size)
            for tokens, count in zip(sets, counts, strict=True)
        )
        return training, held_out

    @cached_property
    def training_loss(self) -> CrossEntropy:
        """Cross-entropy on training images, kept beside the record."""
        folder, print_ = (
            self.experiment.folder("calibrate"),
            self.experiment.fingerprint("calibrate"),
        )
        return self._loss(self.images[0], folder / LOSSES_FILE, print_)

    @cached_property
    def held_out_loss(self) -> CrossEntropy:
        return self._loss(self.images[1])

    def _loss(self, images: TeacherForced, *kept: Any) -> CrossEntropy:
        impl, by_tokens = self.experiment.config.moe.impl, self.config.loss == "ce_tokens"
        return CrossEntropy(self.model, images, impl, by_tokens, *kept)

    @cached_property
    def cells(self) -> dict[Cell, Tails]:
        """Router scores under teacher forcing."""
        batches = [(labels, teacher) for labels, teacher, _ in self.images[0].batches()]
        return record_scores(self.model, batches)

    @cached_property
    def fixed(self) -> FixedCost:
        return fixed_cost(self.model, self.vqvae, **self.experiment.config.sampling.counted)

    @cached_property
    def dense_gmac(self) -> float:
        fixed = fixed_cost(self.model.dense, self.vqvae, self.experiment.config.sampling.cfg)
        return report(fixed, ExpertHistogram.none(1), {}).total_gmac

    def drawn(
        self, rules: Sequence[SelectionRule], seed: int, observer: Observer | None = None
    ) -> FlopReport:
        """Sample images, balanced over the classes, and count their FLOPs."""
        config = self.experiment.config
        labels = balanced_labels(self.config.drawn, config.var.num_classes)
        drawing = Drawing(
            self.model, self.vqvae, labels, seed, config.sampling, list(rules), config.moe.impl
        )
        numbers = range(drawing.num_batches)
        ran = ExpertHistogram.joined(drawing.batch(n, observer).ran for n in numbers)
        return report(self.fixed, ran, drawing.rules)

    def drawn_cells(self, rules: Sequence[SelectionRule]) -> dict[Cell, Tails]:
        """Record router scores while images are sampled under these rules."""
        recorder = Recorder(self.model)
        self.drawn(rules, self.config.seed, recorder)
        return recorder.tails()


@dataclass(frozen=True)
class Found:
    """A budget's tau, and the plan that found them."""

    budget: float
    taus: Taus
    plan: Plan

    @property
    def rules(self) -> list[SelectionRule]:
        return self.plan.rules(self.taus)


@dataclass(frozen=True)
class Calibration:
    """Finds tau for shares of the dense FLOPs: one per sparse scale, or one per layer of each."""

    bench: CalibrationBench
    by_layer: bool

    @cached_property
    def plan(self) -> Plan:
        """The plan by teacher-forced scores."""
        return Plan.of(self.bench.fixed, self.bench.cells, self.by_layer)

    def plan_under(self, rules: Sequence[SelectionRule]) -> Plan:
        """Make a plan by the scores of images sampled under these rules, which tell better what
        tau runs."""
        return Plan.of(self.bench.fixed, self.bench.drawn_cells(rules), self.by_layer)

    @cached_property
    def losses(self) -> dict[Group, Losses]:
        """What each group alone costs in quality."""
        densities = self.bench.config.densities
        loss = partial(self._loss, self.plan) if self._measures else None
        with self._bar(len(self.plan.tails) * (len(densities) + 1), "losses") as bar:
            return measure_losses(self.plan, densities, loss, bar.update)

    def find(self, budget: float) -> Found:
        """Find tau at a share of the dense FLOPs, refined by joint losses if configured."""
        found = self.add_up(budget)
        return self._refined(found) if self._measures and self.bench.config.refinements else found

    def add_up(self, budget: float) -> Found:
        """Find tau at a share of the dense FLOPs, best by losses of each group alone. Images that
        are sampled under the found tau correct it."""
        plan = self.plan
        for _ in range(ROUNDS):
            taus = self._reach(budget, partial(taus_for, plan, self.losses))
            plan = self.plan_under(plan.rules(taus))
        return Found(budget, self._reach(budget, partial(taus_for, plan, self.losses)), plan)

    def _reach(self, budget: float, find: Callable[[float], Taus]) -> Taus:
        """Find tau at a share of the dense FLOPs. Raise InputError if none costs as little."""
        try:
            return find(budget * self.bench.dense_gmac)
        except ValueError as error:
            reason = f"out of reach ({error} GMAC)"
            raise InputError(f"calibrate.budget={budget:g}: {reason}") from error

    def _refined(self, found: Found) -> Found:
        """Refine at equal FLOPs to a training loss no higher than that of `found` and of one tau
        everywhere. Images are sampled once more, to correct the FLOPs of tau that moved."""
        rounds, plan = self.bench.config.refinements, found.plan
        half = dict.fromkeys(plan.tails, 0.5)
        one_tau = self._reach(found.budget, partial(at_cost, half, plan.gmac))
        most = most_losses(len(plan.tails), rounds)
        with self._bar(most, f"refining {found.budget:.3g}") as bar:

            def loss(taus: Taus) -> float:
                bar.update()
                return self._loss(plan, taus)

            taus = refine(plan, [found.taus, one_tau], loss, rounds)
        plan = self.plan_under(plan.rules(taus))
        taus = self._reach(found.budget, partial(at_cost, taus, plan.gmac))
        return Found(found.budget, taus, plan)

    @property
    def _measures(self) -> bool:
        """Whether losses are measured: cross-entropy is, but dropped norms just add up."""
        return self.bench.config.loss != "norm"

    def _loss(self, plan: Plan, taus: Taus) -> float:
        return self.bench.training_loss(plan.rules(taus))

    def _bar(self, total: int, name: str) -> Any:
        by = " by layer" if self.by_layer else ""
        return tqdm(total=total, desc=name + by, disable=not self.bench.experiment.progress)
