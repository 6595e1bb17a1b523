"""ReLUfication: the trained model's GELU becomes ReLU before sparse fine-tuning."""

from __future__ import annotations

from dataclasses import replace

from dmoe_var.models.var import VAR


def relufy(var: VAR) -> VAR:
    """A copy of `var` whose FFNs use ReLU; the weights are the same."""
    relu_var = VAR(replace(var.config, activation="relu")).to(var.pos_start)
    relu_var.load_state_dict(var.state_dict())
    return relu_var.train(var.training)
