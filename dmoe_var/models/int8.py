"""Hold the transformer's linear layers in 8 bits, by torchao (beyond the paper).

Weights are integers by output channel, and activations by token as they come, or weights alone
(which is what pays on a GPU). Experts, routers, norms and the VQ-VAE stay as they are.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from dmoe_var.errors import ConfigError
from dmoe_var.models.dynamic_var import DynamicVAR

Model = TypeVar("Model", bound=nn.Module)

Int8 = Literal["none", "dynamic", "weights"]


def check_int8(asked: Int8) -> None:
    """Raise ConfigError if 8 bits are asked for and torchao is not installed."""
    if asked != "none" and find_spec("torchao") is None:
        raise ConfigError(
            f"sampling.int8={asked}: needs torchao (pip install -e '.[int8]'); else none"
        )


def in_precision(model: Model, asked: Int8) -> Model:
    """Return a VAR, `DynamicVAR` or `CollaborativeVAR` as it is, or a copy with the linear layers
    of its blocks and its head in 8 bits."""
    if asked == "none":
        return model
    check_int8(asked)
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    made = copy.deepcopy(model)
    how: Any = Int8WeightOnlyConfig()
    if asked == "dynamic":  # AVX2's products of 8 bits overflow their sums of 16, but not in 7 bits
        few_bits = not torch.cpu._is_vnni_supported()
        how = Int8DynamicActivationInt8WeightConfig(reduce_range=few_bits)

    def is_held(module: nn.Module, name: str) -> bool:
        places = name.split(".")
        within = "blocks" in places or "head" in places
        return isinstance(module, nn.Linear) and within and "router" not in places

    joined = [each for each in made.modules() if isinstance(each, DynamicVAR)]
    shared = [each.shared_names for each in joined]
    quantize_(made, how, filter_fn=is_held)
    for each, names in zip(joined, shared, strict=True):
        each.share(names)
    return made
