"""Export the finished model as one folder (DynamicVAR.save_pretrained), and to the hub if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmoe_var.checkpoints.pretrained import EXPORTED as FOLDER
from dmoe_var.config.root import Config
from dmoe_var.distributed import is_main
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import require
from dmoe_var.experiment.record import Record
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.experiment.view import OPTIONAL, within
from dmoe_var.report.model_card import push_to_hub, save_pretrained
from dmoe_var.report.records import found, other_experts
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import EXPERTS, Models, needs_experts
from dmoe_var.stages.parts.skipped_means import let_means_stand

MAKING, MEASURING = ("sparsify", "split", "train_router"), ("evaluate", "sweep")
"""Stages whose records the model card tells of."""


def run(experiment: Experiment) -> StageResult:
    """Write dynamic_var/, with `selection` as what runs by default, the recipe of `sampling`, and
    means of what it skips if `moe.skipped` asks for them."""
    model = loaded.dynamic(experiment)
    model.selection = experiment.config.selection.rules()
    model.recipe = experiment.config.sampling.recipe
    if experiment.config.moe.skipped == "mean":
        vqvae = loaded.vqvae(experiment)
        let_means_stand(Models(experiment), experiment, model, vqvae, model.selection)
    making = dict.fromkeys((*MAKING, experiment.whole.expert_stage))
    records = [require(experiment, stage) for stage in making] + measured(experiment)
    folder = experiment.folder("export") / FOLDER
    about = {"folder": FOLDER, "records": [f"{r.stage}/{r.variant}" for r in records]}
    if is_main():
        save_pretrained(model, folder, records)
        to, private = experiment.config.export.push_to, experiment.config.export.private
        if to is not None:
            about["url"] = push_to_hub(model, to, private=private, records=records)
    tensors = {t.data_ptr(): t.numel() for t in model.parameters()}
    dense = sum(p.numel() for p in model.dense.parameters())
    metrics = {"parameters_m": sum(tensors.values()) / 1e6, "dense_parameters_m": dense / 1e6}
    return StageResult(metrics, about=about)


def measured(experiment: Experiment) -> list[Record]:
    """Find evaluations of this very model under this rule, of the dense one, and sweeps, whatever
    their sample counts and references. Broken records are left out."""
    records = [record for stage in MEASURING for _, record in found(experiment, stage)]
    return [r for r in records if _is_ours(experiment, r) and not other_experts(experiment, r)]


def _is_ours(experiment: Experiment, record: Record) -> bool:
    model = record.config.get("evaluate.model")
    if model == "dense":
        return True
    if record.config.get("moe.skipped", "zero") != experiment.whole.moe.skipped:
        return False
    alike = _rule(record.config) == _rule(experiment.whole.leaves)
    return record.stage == "sweep" or (model != "pruned" and alike)


def _rule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the keys that say which experts run, and at which scales."""
    return {
        key: value
        for key, value in config.items()
        if within(key, ("selection", "moe.scales")) and (value or key not in OPTIONAL)
    }


def reads(config: Config, ours: Config) -> Keys:
    """Declare the keys; means of skipped experts are of what the sampler runs."""
    recipe = ("sampling.cfg", "sampling.share_mask", "sampling.skipping", "sampling.heads")
    return (*EXPERTS, "export", *(("sampling",) if config.moe.skipped == "mean" else recipe))


def refuse(config: Config) -> None:
    loaded.refuse_drafter(config, "a drafter is not exported")
    loaded.refuse_int8(config, "weights are exported as floats")


STAGE = Stage("export", run, reads, needs=needs_experts, refuse=refuse, always_runs=True)
