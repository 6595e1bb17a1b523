"""Hoyer's sparsity measure of FFN activations, and how sparse they are.

Legend: B batch, L tokens, H neurons of the hidden layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dmoe_var.models.blocks import FFN
from dmoe_var.models.var import VAR

CLAMP = 10.0


def hoyer(a_BLH: Tensor) -> Tensor:
    """mean over (batch, tokens) of ||a||_1^2 / (||a||_2^2 + 1e-15): 1 for one active neuron, H
    for all equally active."""
    l1_BL = a_BLH.abs().sum(-1)
    return (l1_BL.square() / (a_BLH.square().sum(-1) + 1e-15)).mean()


def hoyer_loss(activations: Sequence[Tensor]) -> Tensor:
    """Mean over the layers of `hoyer`, in float32."""
    return torch.stack([hoyer(a_BLH.float()) for a_BLH in activations]).mean()


def shifted_pre_activation(z_BLH: Tensor) -> Tensor:
    """What the ablation without ReLU makes sparse: pre-activations clamped at -10, plus 10."""
    return z_BLH.clamp_min(-CLAMP) + CLAMP


def inactive_share(a_BLH: Tensor, tokens: slice) -> Tensor:
    """Share of activations that are not positive, over the given tokens."""
    return (a_BLH[:, tokens] <= 0).float().mean()


@contextmanager
def record_activations(var: VAR, pre_activation: bool = False) -> Iterator[list[Tensor]]:
    """Collects the hidden activations (or what enters the activation) of all FFNs, in order."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(inputs[0] if pre_activation else output)

    handles = []
    for block in var.blocks:
        ffn = block.ffn
        assert isinstance(ffn, FFN)
        handles.append(ffn.act.register_forward_hook(keep))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
