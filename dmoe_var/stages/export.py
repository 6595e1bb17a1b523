"""Export the finished model as one folder (DynamicVAR.save_pretrained), and to the hub if asked."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dmoe_var.checkpoints.pretrained import EXPORTED as FOLDER
from dmoe_var.config.root import flatten
from dmoe_var.distributed import is_main
from dmoe_var.experiment.graph import require
from dmoe_var.experiment.record import RESULT_FILE, Record, whole_record
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.experiment.view import OPTIONAL
from dmoe_var.experiment.work import Work
from dmoe_var.report.model_card import push_to_hub, save_pretrained
from dmoe_var.stages import loaded
from dmoe_var.stages.loaded import EXPERTS

MAKING, MEASURING = ("sparsify", "split", "train_router"), ("evaluate", "sweep")
"""Stages whose records the model card tells of."""


def run(work: Work) -> StageResult:
    """Write dynamic_var/, with `selection` as what runs by default."""
    model = loaded.dynamic(work)
    model.selection = work.config.selection.rules()
    records = [require(work, stage) for stage in MAKING] + measured(work)
    folder = work.folder("export") / FOLDER
    about = {"folder": FOLDER, "records": [f"{r.stage}/{r.variant}" for r in records]}
    if is_main():
        save_pretrained(model, folder, records)
        if work.config.export.push_to is not None:
            about["url"] = push_to_hub(
                model,
                work.config.export.push_to,
                private=work.config.export.private,
                records=records,
            )
    tensors = {t.data_ptr(): t.numel() for t in model.parameters()}
    dense = sum(p.numel() for p in model.dense.parameters())
    metrics = {"parameters_m": sum(tensors.values()) / 1e6, "dense_parameters_m": dense / 1e6}
    return StageResult(metrics, about=about)


def measured(work: Work) -> list[Record]:
    """Find evaluations of this very model under this rule, of the dense one, and sweeps, whatever
    their sample counts and references. Broken records are left out."""
    given = dict(flatten({"selection": asdict(work.config.selection)}))
    rule = {key: value for key, value in given.items() if value or key not in OPTIONAL}
    scales = {"moe.scales": list(work.config.moe.scales)}
    records = []
    for stage in MEASURING:
        for path in sorted((work.root / stage).glob(f"*/{RESULT_FILE}")):
            record = whole_record(path, "left out")
            shown: dict[str, Any] = {}
            if record is None or record.config.get("evaluate.samples"):
                continue
            if record.config.get("evaluate.model") == "pruned" and stage == "evaluate":
                continue
            if stage == "evaluate" and record.config.get("evaluate.model") != "dense":
                shown = rule | scales
            more = [key for key in OPTIONAL if key not in shown and record.config.get(key)]
            if more and stage == "evaluate" and record.config.get("evaluate.model") != "dense":
                continue  # another rule, which this model does not have
            same = all(record.config.get(key) == value for key, value in shown.items())
            if same and not work.differing("train_router", record):
                records.append(record)
    return records


STAGE = Stage("export", run, reads=(*EXPERTS, "export"), needs=("train_router",), always_runs=True)
