"""Find a recipe for a budget: how strong guidance is and where it ends, how many scales a drafter
draws, which tokens are skipped, what stands for experts that do not run, and tau for each layer.
FID of images that nothing else uses decides, because losses under teacher forcing cannot see
guidance.

One technique comes after the other, and each keeps the value under which FID is best. For every
combination that is tried, tau are calibrated so that its images take the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from dmoe_var.config.recipe import write_recipe
from dmoe_var.config.root import Config
from dmoe_var.distributed import is_main
from dmoe_var.errors import ConfigError, InputError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import run_stage
from dmoe_var.experiment.points import vary
from dmoe_var.experiment.record import Record
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.metrics.flops import report
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.models.guidance import Cfg, by_scale
from dmoe_var.moe.counts import ExpertHistogram
from dmoe_var.stages import evaluate
from dmoe_var.stages.parts.loaded import drafter_keys, needs_experts, refuse_int8

RECIPE_FILE = "recipe.json"
WITHIN = 0.01
"""Largest relative distance of a recipe's FLOPs from the budget."""
ROUNDS = 4
"""Most calibrations of a combination: techniques beside experts change how many of these run."""
FIRST_SHARE = 0.99
"""Largest share of the FLOPs that experts are asked to leave, routers included."""
OFF: dict[str, Any] = {
    "moe.skipped": "zero",
    "sampling.skipping.ratios": (),
    "sampling.heads.ratios": (),
}
"""What is off unless a combination switches it on."""
NO_DRAFTER: dict[str, Any] = {"drafter.var": None, "drafter.scales": None}

Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Tried:
    """A combination of techniques with the tau that meet the budget, and what it measured."""

    keys: Keys
    gmac: float
    fid: float

    def row(self) -> dict[str, Any]:
        return {"keys": dict(self.keys), "flops_gmac": self.gmac, "fid": self.fid}


class Search:
    """Measures combinations, and reuses the records of those that were measured before."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.config = experiment.config.find_recipe
        self.bench = evaluate.Bench(experiment)
        self.plain: Keys = {
            "evaluate.model": "dense",
            **drafting(experiment.whole, experiment.config.var.num_scales),
        }
        """The dense model that the budget is a share of: the drafter, if there is one."""
        self.dense_gmac = self._dense_gmac(self.plain)
        self.target = self.config.budget * self.dense_gmac
        self.tried: list[Tried] = []

    def point(self, keys: Keys, seed: int | None = None) -> Record:
        """Evaluate images of a seed, the search's own if it is None."""
        seed = self.config.seed if seed is None else seed
        sized = {"evaluate.num_samples": self.config.num_samples, "evaluate.seed": seed}
        experiment = vary(self.experiment, {**OFF, **keys, **sized})
        return run_stage(experiment, "evaluate", partial(evaluate.run, bench=self.bench))

    @staticmethod
    def fid(record: Record) -> float:
        return record.metrics[record.about["fidelity"]]

    def fitted(self, keys: Keys) -> Tried | None:
        """Calibrate tau until a combination takes the budget; None if no tau does."""
        dense_gmac = self._dense_gmac(keys)
        if dense_gmac <= self.target:  # guidance and drafter alone save as much
            return self._measured({**keys, "evaluate.model": "dense"})
        # tau are calibrated for the model with experts alone: all has to be saved there
        ours_gmac = self._dense_gmac({**keys, **NO_DRAFTER})
        drafting_gmac = dense_gmac - ours_gmac
        target = self.target - drafting_gmac
        share, closest = min(target / ours_gmac, FIRST_SHARE), None
        for _ in range(ROUNDS):
            tau = self._tau(keys, share) if share > 0 else None
            if tau is None:
                break
            found = self._measured(
                {**keys, "evaluate.model": "dynamic", "selection.rule": "threshold", **tau}
            )
            if closest is None or abs(found.gmac - self.target) < abs(closest.gmac - self.target):
                closest = found
            if abs(found.gmac / self.target - 1) <= WITHIN:
                break
            share = min(share * target / (found.gmac - drafting_gmac), 1.0)
        return closest

    def best(self, combinations: list[Keys], name: str) -> Tried:
        """Try combinations; return the one with the best FID of those within the budget."""
        within = []
        for keys in tqdm(combinations, desc=name, disable=not self.experiment.progress):
            found = self.fitted(keys)
            if found is not None:
                self.tried.append(found)
                if found.gmac <= self.target * (1 + WITHIN):
                    within.append(found)
        if not within:
            raise InputError(
                f"find_recipe.budget={self.config.budget:g}: out of reach of every {name} that "
                "was tried; allow more, or try more (find_recipe.unguided, find_recipe.drafted)"
            )
        return min(within, key=lambda each: each.fid)

    def _measured(self, keys: Keys) -> Tried:
        record = self.point(keys)
        return Tried(keys, record.metrics["flops_gmac"], self.fid(record))

    def _dense_gmac(self, keys: Keys) -> float:
        """Count the FLOPs under the guidance and with the drafter of a combination, all dense."""
        point = vary(self.experiment, {**OFF, **keys})
        model = self.bench.drafted(point, self.bench.dense)
        fixed = fixed_cost(model, self.bench.vqvae, point.whole.sampling.cfg)
        return report(fixed, ExpertHistogram.none(1), {}).total_gmac

    def _tau(self, keys: Keys, share: float) -> Keys | None:
        """Calibrate tau by layer for a share of that; None if it is out of reach."""
        guided = {key: value for key, value in keys.items() if key == "sampling.cfg"}
        asked = {"calibrate.budget": share, "calibrate.by_layer": True, "calibrate.budgets": ()}
        asked |= {"calibrate.budget_ms": None, **NO_DRAFTER}
        point = vary(self.experiment, {**OFF, **guided, **asked})
        try:
            tau = run_stage(point, "calibrate").about["tau"]
        except ConfigError:
            raise
        except InputError:
            return None
        return {"selection.layer_tau": tuple(tuple(of_scale) for of_scale in tau)}


def guidances(strengths: Sequence[Cfg], unguided: Sequence[int], num_scales: int) -> list[Cfg]:
    """List each strength with each end, without those that sample the same: the first scale is
    never guided. The first strength keeps its spelling where guidance does not end early, so that
    its records are found."""
    found: dict[tuple[float, ...], Cfg] = {}
    for strength in strengths:
        cfg_S = by_scale(strength, num_scales)
        for n in unguided:
            ended_S = (*cfg_S[: num_scales - n], *(0.0,) * n)
            found.setdefault(ended_S[1:], strength if ended_S == cfg_S else ended_S)
    return list(found.values())


def drafting(config: Config, scales: int | None = None) -> Keys:
    """List the keys with which the drafter draws so many scales, `drafter.scales` if it is None;
    none if there is no drafter. They name the refiner too: without it a recipe would silently
    refine by whatever model an experiment has."""
    if config.drafter.var is None:
        return {}
    number = config.drafter.scales if scales is None else scales
    refiner = {"var.depth": config.var.depth, "base.var": config.base.var}
    return {**refiner, "drafter.var": config.drafter.var, "drafter.scales": number}


def run(experiment: Experiment) -> StageResult:
    """Search, verify on images of another seed, and write recipe.json."""
    config = experiment.config.find_recipe
    search = Search(experiment)
    num_scales = experiment.config.var.num_scales
    configured = experiment.config.sampling.cfg
    # How strong guidance is and where it ends, and how many scales are drafted
    ends = guidances((configured, *config.cfg), config.unguided, num_scales)
    drafts = [drafting(experiment.whole, scales) for scales in config.drafted or (None,)]
    combinations: list[Keys] = [{"sampling.cfg": e, **d} for d in drafts for e in ends]
    best = search.best(combinations, "guidance")
    guided = {"sampling.cfg": best.keys["sampling.cfg"]}
    # Which tokens are skipped
    shares = [share for share in config.skipped_tokens if share > 0]
    late = [(*(0.0,) * (num_scales - 2), share, share) for share in shares]
    combinations = [{**guided, "sampling.skipping.ratios": each} for each in late]
    found = [best, *([search.best(combinations, "share of tokens")] if combinations else [])]
    best = min(found, key=lambda each: each.fid)
    # What stands for skipped experts
    if config.means and best.keys["evaluate.model"] == "dynamic":
        with_means = search._measured({**best.keys, "moe.skipped": "mean"})
        search.tried.append(with_means)
        best = min((best, with_means), key=lambda each: each.fid)
    # Verify, beside the dense model (the drafter) as configured, and under the recipe's guidance
    dense, guided_dense, ours = (
        search.point(keys, config.seed + 1)
        for keys in (search.plain, {**search.plain, **guided}, best.keys)
    )
    verified = {
        "dense_gmac": search.dense_gmac,
        "dense_fid": search.fid(dense),
        "dense_guided_gmac": guided_dense.metrics["flops_gmac"],
        "dense_guided_fid": search.fid(guided_dense),
        "flops_gmac": ours.metrics["flops_gmac"],
        "flops_share": ours.metrics["flops_gmac"] / search.dense_gmac,
        "fid": search.fid(ours),
    }
    for name in ("label_agreement",):
        if name in ours.metrics:
            verified |= {
                name: ours.metrics[name],
                f"dense_{name}": dense.metrics[name],
                f"dense_guided_{name}": guided_dense.metrics[name],
            }
    tried = [each.row() for each in search.tried]
    about = {"keys": dict(best.keys), "tried": tried, "fidelity": ours.about["fidelity"]}
    if is_main():
        folder = experiment.folder("find_recipe")
        write_recipe(folder / RECIPE_FILE, best.keys, {**verified, "images": config.num_samples})
    return StageResult(verified, config.num_samples, {**about, "recipe": RECIPE_FILE}, config.seed)


def refuse(config: Config) -> None:
    """Raise ConfigError for techniques that the search sets by itself, and what it cannot try."""
    evaluate.refuse(config)
    evaluate.refuse_given_samples(config)
    refuse_int8(config, "recipes are compared in floats")
    for key, set_to in OFF.items():
        given = config.leaves[key]
        if given not in (set_to, list(set_to)):
            raise ConfigError(f"{key}={given}: find_recipe chooses it; allowed here: {set_to}")
    _refuse_drafted(config)
    most = max(config.find_recipe.unguided)
    if most >= config.var.num_scales:
        raise ConfigError(
            f"find_recipe.unguided={most} must be at most {config.var.num_scales - 1}, the scales "
            "after the first"
        )


def _refuse_drafted(config: Config) -> None:
    """Raise ConfigError for numbers of drafted scales without a drafter, or that leave none to the
    refiner, and for a drafter where tokens are to be skipped."""
    search, last = config.find_recipe, config.var.num_scales - 1
    if config.drafter.var is None:
        if search.drafted:
            raise ConfigError(
                f"find_recipe.drafted={list(search.drafted)}: there is no drafter "
                "(drafter.var=null); allowed without: []"
            )
        return
    for key, number in (
        ("find_recipe.drafted", max(search.drafted, default=0)),
        ("drafter.scales", config.drafter.scales or 0),
    ):
        if number > last:
            raise ConfigError(
                f"{key}={number} must be within 0..{last}, to leave a scale to refine"
            )
    if any(search.skipped_tokens):
        raise ConfigError(
            f"find_recipe.skipped_tokens={list(search.skipped_tokens)}: a drafter and its refiner "
            "skip no tokens; allowed with drafter.var: [0]"
        )


STAGE = Stage(
    "find_recipe",
    run,
    reads=lambda config, _: (
        *("moe", "sampling", "calibrate", "fidelity", "find_recipe"),
        *drafter_keys(config),
    ),
    needs=lambda config: (*needs_experts(config), *evaluate.needs_classifier(config)),
    refuse=refuse,
    one_process=True,
    reads_pictures=True,
    compares=True,
)
