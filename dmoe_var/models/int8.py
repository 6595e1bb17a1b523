"""Hold the transformer's linear layers in 8 bits, by torchao (beyond the paper).

On a CPU weights and activations are integers: weights by output channel, activations by token as
they come. On a GPU weights alone are. Experts, routers, norms and the VQ-VAE stay as they are.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TypeVar

from torch import nn

from dmoe_var.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)

FLOATS = ("router",)
"""Names of modules whose linear layers stay: what they decide is not to be rounded."""


def check_int8() -> None:
    """Raise ConfigError if torchao is not installed."""
    if find_spec("torchao") is None:
        raise ConfigError(
            "sampling.int8=true: needs torchao (pip install -e '.[int8]'); allowed without: false"
        )


def in_int8(model: Model) -> Model:
    """Copy a VAR, `DynamicVAR` or `CollaborativeVAR`, with the linear layers of its blocks and its
    head in 8 bits."""
    check_int8()
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    made = copy.deepcopy(model)
    on_cpu = next(made.parameters()).device.type == "cpu"
    how = Int8DynamicActivationInt8WeightConfig() if on_cpu else Int8WeightOnlyConfig()

    def is_held(module: nn.Module, name: str) -> bool:
        places = name.split(".")
        within = "blocks" in places or "head" in places
        return within and isinstance(module, nn.Linear) and not set(FLOATS) & set(places)

    quantize_(made, how, filter_fn=is_held)
    return made
