"""ReLUfication: replace the trained model's GELU by ReLU, before sparse fine-tuning."""

from __future__ import annotations

from dataclasses import replace

from dmoe_var import values
from dmoe_var.models.build import build_strictly
from dmoe_var.models.var import VAR


def relufy(var: VAR) -> VAR:
    """Copy `var` with ReLU in its FFNs; the weights are the same. Raise ValueError for no VAR."""
    values.instance("var", var, VAR)
    tensors = {name: tensor.clone() for name, tensor in var.state_dict().items()}
    config = replace(var.config, activation="relu")
    relu_var = build_strictly(lambda: VAR(config), tensors, "the dense model")
    return relu_var.train(var.training)
