"""Pruned-FFN, the static baseline: the least active hidden neurons are dropped for every token.

Legend: B batch, L tokens of all scales, l tokens of one scale, C width, H neurons of the hidden
layer, K neurons that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dmoe_var import values
from dmoe_var.config_fields import STRICT
from dmoe_var.conversion.hoyer import ActivationProbe
from dmoe_var.conversion.to_moe import dense_ffns
from dmoe_var.distributed import sum_over_processes
from dmoe_var.models.build import build_strictly
from dmoe_var.models.var import VAR
from dmoe_var.ops import widest_float


@dataclass(frozen=True)
class PruningConfig:
    """Which neurons the pruned baseline drops (read if evaluate.model is pruned)."""

    __pydantic_config__ = STRICT

    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of each FFN's neurons that are dropped at moe.scales, lowest mean activation first."""
    rule: Literal["mean_abs", "mean_signed"] = "mean_abs"
    """Which mean is taken: of absolute activations or, as in the authors' code, of signed ones."""
    model: Literal["dense", "sparse"] = "dense"
    """Which model is pruned: the dense one, or the one that was fine-tuned to be sparse."""
    images: Annotated[int, Field(gt=0)] = 256
    """Most training images that activations are averaged over."""


@torch.no_grad()
def mean_activations(
    var: VAR,
    batches: Iterable[tuple[Tensor, Tensor]],
    scales: Sequence[int],
    signed: bool = False,
) -> list[Tensor]:
    """Average each hidden neuron's activation on the tokens of `scales`: (H,) per layer, on CPU.

    batches: labels (B,) and teacher input (B, L - 1, Cvae). Each runs twice, teacher-forced and in
    eval mode: with its labels and with the null class, since under guidance half of all tokens are
    of that branch. signed: average the activations, not their absolute values. Sums are in float64
    (float32 on MPS). Each of several processes passes a part of the batches and gets the means over
    all. Raises ValueError if the model has experts, or if there is no batch.
    """
    total = partial(torch.zeros, dtype=widest_float(var.pos_start.device))
    sums = [total(var.config.hidden, device=var.pos_start.device) for _ in var.blocks]
    num_tokens = total(1, device=var.pos_start.device)
    slices = [
        var.config.scale_slices[si]
        for si in values.whole_numbers("scales", scales, 0, var.config.num_scales - 1)
    ]

    def add(layer: int, a_BLH: Tensor) -> None:
        for tokens in slices:
            a_BlH = a_BLH[:, tokens] if signed else a_BLH[:, tokens].abs()
            sums[layer] += a_BlH.sum((0, 1), dtype=sums[layer].dtype)

    dense_ffns(var)  # raises for a model with experts
    # A second model over the same memory, in eval mode: `var` keeps its mode and its hooks.
    quiet = build_strictly(lambda: VAR(var.config), dict(var.state_dict()), "the model")
    ActivationProbe(quiet).see = add
    for labels_B, teacher_BLC in batches:
        for labels in (labels_B, torch.full_like(labels_B, var.config.num_classes)):
            quiet(labels, teacher_BLC)
            num_tokens += len(labels) * sum(tokens.stop - tokens.start for tokens in slices)
    sum_over_processes([*sums, num_tokens])
    if not num_tokens:
        raise ValueError("mean activations need at least one token")
    return [(of_layer / num_tokens).cpu().double() for of_layer in sums]


def kept_neurons(means_H: Tensor, share: float) -> Tensor:
    """Choose the neurons that stay, LongTensor (K,), rising: all but int(H * share) of lowest mean.

    Of equal means the first ones go. At least one neuron stays. Raises ValueError if `share` is
    outside [0, 1).
    """
    share = values.number("share", share)
    if not 0 <= share < 1:
        raise ValueError(f"share={share} is not within [0, 1)")
    num_dropped = int(len(means_H) * share)
    return torch.argsort(means_H, stable=True)[num_dropped:].sort().values


@torch.no_grad()
def prune(var: VAR, share: float, means: Sequence[Tensor]) -> VAR:
    """Build a VAR with narrower FFNs, which have the neurons that `kept_neurons` keeps.

    means: (H,) per layer, from `mean_activations`. What is not pruned shares the memory of `var`.
    Raises ValueError if the model has experts, or if the means are of another model.
    """
    shapes = [tuple(of_layer.shape) for of_layer in means]
    if shapes != [(var.config.hidden,)] * var.config.depth:
        raise ValueError(f"means of shapes {shapes} are not one for each neuron of each layer")
    tensors = dict(var.state_dict())
    for i, (ffn, means_H) in enumerate(zip(dense_ffns(var), means, strict=True)):
        kept_K = kept_neurons(means_H, share).to(ffn.fc1.weight.device)
        tensors |= {
            f"blocks.{i}.ffn.fc1.weight": ffn.fc1.weight[kept_K],
            f"blocks.{i}.ffn.fc1.bias": ffn.fc1.bias[kept_K],
            f"blocks.{i}.ffn.fc2.weight": ffn.fc2.weight[:, kept_K].contiguous(),
        }
    num_kept = len(tensors["blocks.0.ffn.fc1.bias"])
    config = replace(var.config, mlp_ratio=num_kept / var.config.C)
    return build_strictly(lambda: VAR(config), tensors, "the pruned model").train(var.training)
