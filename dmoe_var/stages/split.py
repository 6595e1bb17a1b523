"""Stage 4: balanced k-means cuts every FFN into experts."""

from __future__ import annotations

from tqdm import tqdm

from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.conversion.to_moe import convert_to_moe
from dmoe_var.stages import models
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.work import Work


def run(work: Work) -> StageResult:
    config = work.config
    var = models.sparse(work)
    with tqdm(total=config.var.depth, desc="split", disable=not config.progress) as bar:
        moe = convert_to_moe(
            var,
            config.split.expert_size,
            config.seed,
            config.split.router_hidden,
            progress=lambda _: bar.update(),
        )
    save_checkpoint(models.checkpoint(work, "split"), moe)
    num_experts = config.var.hidden // config.split.expert_size
    metrics = {"num_experts": num_experts, "expert_size": config.split.expert_size}
    return StageResult(metrics, about={"checkpoint": "checkpoint"})
