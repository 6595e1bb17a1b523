"""Pruned-FFN, the static baseline: the least active hidden neurons go, on every token alike.

Legend: B batch, L tokens of all scales, l tokens of one scale, C width, H neurons of the hidden
layer, K neurons that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from dmoe_var import values
from dmoe_var.distributed import sum_over_processes
from dmoe_var.models.blocks import FFN
from dmoe_var.models.build import build_strictly
from dmoe_var.models.var import VAR
from dmoe_var.ops import widest_float


@dataclass(frozen=True)
class PruningConfig:
    """Which neurons the pruned baseline drops (read where evaluate.model is pruned)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of each FFN's neurons at moe.scales that are dropped, of the lowest mean activation."""
    rule: Literal["mean_abs", "mean_signed"] = "mean_abs"
    """Mean of absolute activations, or, as in the authors' code, of signed ones."""
    model: Literal["dense", "sparse"] = "dense"
    """Model that is pruned: the dense one, or the one that was fine-tuned to be sparse."""
    images: Annotated[int, Field(gt=0)] = 256
    """Training images, at most, that activations are averaged over."""


@torch.no_grad()
def mean_activations(
    var: VAR,
    batches: Iterable[tuple[Tensor, Tensor]],
    scales: Sequence[int],
    signed: bool = False,
) -> list[Tensor]:
    """Mean activation of every hidden neuron on the tokens of `scales`, (H,) a layer, on the CPU.

    batches: labels (B,) and teacher input (B, L - 1, Cvae). Each runs twice, teacher-forced and in
    eval mode: with its labels and with the null class, since under guidance half of all tokens are
    of that branch. signed: the mean itself, else that of absolute values. Summed in float64 (in
    float32 on MPS). Of several processes each gives a part of the batches and gets the means over
    all. ValueError for a model with experts, or without a single batch.
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

    # Another over the same memory, in eval mode: the model keeps its mode, and its hooks.
    quiet = build_strictly(lambda: VAR(var.config), dict(var.state_dict()), "the model")
    with _shown_activations(quiet, add):
        for labels_B, teacher_BLC in batches:
            for labels in (labels_B, torch.full_like(labels_B, var.config.num_classes)):
                quiet(labels, teacher_BLC)
                num_tokens += len(labels) * sum(tokens.stop - tokens.start for tokens in slices)
    sum_over_processes([*sums, num_tokens])
    if not num_tokens:
        raise ValueError("mean activations need at least one token")
    return [(of_layer / num_tokens).cpu().double() for of_layer in sums]


def kept_neurons(means_H: Tensor, share: float) -> Tensor:
    """Neurons that stay, LongTensor (K,), rising: all but the int(H * share) of lowest mean.

    Of equal means the first go. At least one neuron stays; ValueError for a share outside [0, 1).
    """
    share = values.number("share", share)
    if not 0 <= share < 1:
        raise ValueError(f"share={share} is not within [0, 1)")
    num_dropped = int(len(means_H) * share)
    return torch.argsort(means_H, stable=True)[num_dropped:].sort().values


@torch.no_grad()
def prune(var: VAR, share: float, means: Sequence[Tensor]) -> VAR:
    """A VAR with narrower FFNs: of each, the neurons that `kept_neurons` keeps.

    means: (H,) a layer, from `mean_activations`. Whatever is not pruned is the same memory as
    `var`'s. ValueError for a model with experts, or for means of another model.
    """
    shapes = [tuple(of_layer.shape) for of_layer in means]
    if shapes != [(var.config.hidden,)] * var.config.depth:
        raise ValueError(f"means of shapes {shapes} are not one for each neuron of each layer")
    tensors = dict(var.state_dict())
    for i, (ffn, means_H) in enumerate(zip(_dense_ffns(var), means, strict=True)):
        kept_K = kept_neurons(means_H, share).to(ffn.fc1.weight.device)
        tensors |= {
            f"blocks.{i}.ffn.fc1.weight": ffn.fc1.weight[kept_K],
            f"blocks.{i}.ffn.fc1.bias": ffn.fc1.bias[kept_K],
            f"blocks.{i}.ffn.fc2.weight": ffn.fc2.weight[:, kept_K].contiguous(),
        }
    num_kept = len(tensors["blocks.0.ffn.fc1.bias"])
    config = replace(var.config, mlp_ratio=num_kept / var.config.C)
    return build_strictly(lambda: VAR(config), tensors, "the pruned model").train(var.training)


@contextmanager
def _shown_activations(var: VAR, see: Callable[[int, Tensor], object]) -> Iterator[None]:
    """Calls see(layer, a_BLH) with what leaves each FFN's activation, as it is computed."""

    def show(layer: int, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        see(layer, output)

    handles = [
        ffn.act.register_forward_hook(partial(show, layer))
        for layer, ffn in enumerate(_dense_ffns(var))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dense_ffns(var: VAR) -> list[FFN]:
    ffns = [block.ffn for block in var.blocks]
    if not all(isinstance(ffn, FFN) for ffn in ffns):
        raise ValueError("a model with experts cannot be pruned; give the one that is not split")
    return ffns  # type: ignore[return-value]
