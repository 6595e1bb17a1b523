"""Measure how sparse FFN activations are, by Hoyer's measure, as the model computes them.

Legend: B batch, L tokens, H neurons of the hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from dmoe_var.models.var import VAR
from dmoe_var.ops import at_least_float32

CLAMP = 10.0  # of the ablation without ReLU


def hoyer(a_BLH: Tensor) -> Tensor:
    """Average ||a||_1^2 / (||a||_2^2 + 1e-15) over batch and tokens: 1 if one neuron is active, H
    if all are equally active. In float32 at least."""
    a_BLH = at_least_float32(a_BLH)
    l1_BL = a_BLH.abs().sum(-1)
    return (l1_BL.square() / (a_BLH.square().sum(-1) + 1e-15)).mean()


def shifted_pre_activation(z_BLH: Tensor) -> Tensor:
    """Clamp pre-activations at -10 and add 10; the ablation without ReLU makes these sparse."""
    return z_BLH.clamp_min(-CLAMP) + CLAMP


class ActivationProbe:
    """Passes the hidden activations of every FFN (or the pre-activations) to `see`.

    `see(layer, a_BLH)` is called as they are computed, so nobody has to keep them; None switches
    the probe off. Under activation checkpointing the backward pass computes and passes them again,
    so `see` has to stay the same until it has run.
    """

    def __init__(self, var: VAR, pre_activation: bool = False):
        self.see: Callable[[int, Tensor], object] | None = None
        self.pre_activation = pre_activation
        for layer, block in enumerate(var.blocks):
            block.get_submodule("ffn.act").register_forward_hook(partial(self._show, layer))

    def _show(self, layer: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.see is not None:
            self.see(layer, inputs[0] if self.pre_activation else output)
