"""The finished model as one folder to share: DynamicVAR.save_pretrained; the hub where asked."""

from __future__ import annotations

from dmoe_var.checkpoints.pretrained import push_to_hub, save_pretrained
from dmoe_var.stages import models
from dmoe_var.stages.graph import StageResult, record_if_done
from dmoe_var.stages.work import Work
from dmoe_var.training.distributed import is_main

FOLDER = "dynamic_var"
ON_THE_CARD = ("sparsify", "split", "train_router", "evaluate", "sweep")
"""Stages whose records the model card tells of, where they are done."""


def run(work: Work) -> StageResult:
    """Writes dynamic_var/, with `selection` as what runs by default."""
    model = models.dynamic(work)
    model.selection = work.config.selection.rules()
    found = (record_if_done(work, stage) for stage in ON_THE_CARD)
    records = [record for record in found if record is not None]
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
