"""Split: cut every FFN of a VAR into experts of one size (DMoE-VAR, expert construction).

Legend: H neurons of the hidden layer, C width, E experts, D neurons per expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmoe_var import values
from dmoe_var.conversion.balanced_kmeans import balanced_labels
from dmoe_var.models.blocks import FFN
from dmoe_var.models.build import build_strictly
from dmoe_var.models.var import VAR, Labels
from dmoe_var.moe.layer import ExpertConfig, MoEFFN
from dmoe_var.moe.router import Condition, Router


@torch.no_grad()
def fill_experts(experts: MoEFFN, ffn: FFN, labels_H: Tensor) -> None:
    """Copy an FFN's neurons into experts: neuron h goes to expert labels_H[h].

    If every expert runs, the two layers agree whatever the labels are. Raises ValueError unless
    each label occurs exactly `expert_size` times.
    """
    wanted_H = torch.arange(experts.num_experts).repeat_interleave(experts.expert_size)
    sorted_H, order_H = labels_H.sort(stable=True)
    if not torch.equal(sorted_H.cpu(), wanted_H):
        sizes = labels_H.unique(return_counts=True)[1].tolist()
        raise ValueError(f"experts have {sizes} neurons, not {experts.expert_size} each")
    order_ED = order_H.view(experts.num_experts, experts.expert_size)
    experts.w1_EDC.copy_(ffn.fc1.weight[order_ED])
    experts.b1_ED.copy_(ffn.fc1.bias[order_ED])
    experts.w2_EDC.copy_(ffn.fc2.weight.T[order_ED])
    experts.b2_C.copy_(ffn.fc2.bias)


def dense_ffns(var: VAR) -> list[FFN]:
    """Return the FFN of every block; raise ValueError for a model that is split."""
    ffns = [block.ffn for block in var.blocks]
    if not all(isinstance(ffn, FFN) for ffn in ffns):
        raise ValueError("the model has experts already; give the one that is not split")
    return ffns  # type: ignore[return-value]


def cluster_layer(var: VAR, layer: int, expert_size: int, seed: int = 0) -> Tensor:
    """Choose the expert of each FFN neuron of a layer, LongTensor (H,), by balanced k-means."""
    return balanced_labels(dense_ffns(var)[layer].fc1.weight, expert_size, seed)


@torch.no_grad()
def convert_to_moe(
    var: VAR,
    expert_size: int = 128,
    seed: int = 0,
    router_hidden: int | None = None,
    labels: Sequence[Labels] | None = None,
) -> VAR:
    """Make the MoE version of a VAR: the same function if all experts run, with untrained routers.

    labels: the expert of each neuron, (H,) per layer, instead of balanced k-means. The activation
    is kept (`relufy` comes before). Raises ValueError if sizes do not fit the model, or for no VAR.
    """
    values.instance("var", var, VAR)
    experts = ExpertConfig(expert_size, router_hidden)
    config, seed = replace(var.config, experts=experts), values.whole("seed", seed, 0, 2**32 - 1)
    ffns = dense_ffns(var)
    if labels is None:
        labels = [
            cluster_layer(var, layer, experts.expert_size, seed)
            for layer in range(var.config.depth)
        ]
    if len(labels) != var.config.depth:
        raise ValueError(f"labels are given for {len(labels)} of {var.config.depth} layers")
    devices = [var.pos_start.device] if var.pos_start.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        moe = VAR(config).to(var.pos_start)
    rest = {k: v for k, v in var.state_dict().items() if ".ffn." not in k}
    moe.load_state_dict({**moe.state_dict(), **rest})
    for block, ffn, given in zip(moe.blocks, ffns, labels, strict=True):
        labels_H = torch.tensor(values.whole_numbers("labels", given))
        fill_experts(block.ffn, ffn, labels_H.to(ffn.fc1.weight.device))  # type: ignore[arg-type]
    return moe.train(var.training)


def informed(moe: VAR, condition: Condition) -> VAR:
    """Tell the routers of a VAR with experts what `condition` says, over the same memory; vectors
    of scales and classes are 0. The model itself is returned if the condition is none."""
    experts = moe.config.experts
    assert experts is not None
    if condition == "none":
        return moe
    config = replace(moe.config, experts=replace(experts, router_condition=condition))
    tensors = dict(moe.state_dict())
    for i in range(config.depth):
        fc1_RC = tensors[f"blocks.{i}.ffn.router.fc1.weight"]
        hidden, width = fc1_RC.shape
        told = (condition, config.num_scales, config.num_classes)
        router = Router(width, hidden, config.num_experts, *told).to(fc1_RC)
        for name, embedding in router.named_parameters(recurse=False):
            tensors[f"blocks.{i}.ffn.router.{name}"] = embedding.detach()
    return build_strictly(lambda: VAR(config), tensors, "the model with experts").train(
        moe.training
    )
