"""Stage 4: balanced k-means cuts every FFN into experts."""

from __future__ import annotations

from torch import Tensor
from tqdm import tqdm

from dmoe_var.conversion.to_moe import cluster_layer, convert_to_moe
from dmoe_var.distributed import gathered, is_main, rank, world_size
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import Stage, StageResult
from dmoe_var.models.var import VAR
from dmoe_var.stages.parts import loaded


def run(experiment: Experiment) -> StageResult:
    config = experiment.config
    var = loaded.sparse(experiment)
    labels = cluster(experiment, var)
    if is_main():
        moe = convert_to_moe(
            var, config.split.expert_size, config.seed, config.split.router_hidden, labels
        )
        loaded.save(experiment, "split", moe)
    num_experts = config.var.hidden // config.split.expert_size
    metrics = {"num_experts": num_experts, "expert_size": config.split.expert_size}
    return StageResult(metrics, about={"checkpoint": "checkpoint"})


def cluster(experiment: Experiment, var: VAR) -> list[Tensor]:
    """Find the expert of each neuron, (H,), in every layer. Processes share the layers."""
    config = experiment.config
    mine = range(config.var.depth)[rank() :: world_size()]
    shown = tqdm(mine, desc="split", unit="layer", disable=not experiment.progress)
    found = {
        layer: cluster_layer(var, layer, config.split.expert_size, config.seed) for layer in shown
    }
    by_layer = {layer: labels for part in gathered(found) for layer, labels in part.items()}
    return [by_layer[layer] for layer in range(config.var.depth)]


STAGE = Stage("split", run, reads=("split",), needs=("sparsify",))
