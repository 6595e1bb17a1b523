"""Average weights over steps: the average samples better than the last step's weights do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dmoe_var.training.state import trainable

SLOWNESS = 10
"""At step t the decay is at most (1 + t) / (SLOWNESS + t): the first weights are soon forgotten."""


class AveragedWeights:
    """Holds an exponential moving average of the parameters that a module trains."""

    def __init__(self, module: nn.Module, decay: float):
        self.module = module
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in trainable(module).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 0, 1, ..."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (SLOWNESS + step)))
        average([*self.tensors.values()], [*trainable(self.module).values()], step)

    @torch.no_grad()
    def put(self) -> None:
        """Put the average into the module."""
        for name, parameter in trainable(self.module).items():
            parameter.copy_(self.tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Lend the average to the module."""
        last = {name: p.detach().clone() for name, p in trainable(self.module).items()}
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in trainable(self.module).items():
                    parameter.copy_(last[name])
