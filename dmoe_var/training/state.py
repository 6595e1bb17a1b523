"""Keep training state in a file, written whole, from which a run goes on bitwise.

Random numbers need no saving: every step seeds its own from (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmoe_var.checkpoints.tensor_files import read_tensors, write_tensors
from dmoe_var.errors import CheckpointError

STATE_FILE = "state.safetensors"
NONE: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class StateFile:
    """The file of a state. `fingerprint` is a hash of the configuration that it belongs to."""

    path: Path
    fingerprint: str
    max_mb: int | None = None
    """See `write_tensors`."""

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Mapping[str, Tensor] = NONE,
    ) -> None:
        """Store what training changes: trainable parameters, buffers, optimiser moments, and the
        averages of the weights, if there are any."""
        tensors = {f"model/{name}": tensor for name, tensor in changing(module).items()}
        for name, parameter in trainable(module).items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        tensors |= {f"average/{name}": tensor for name, tensor in averages.items()}
        header = {"step": step, "fingerprint": self.fingerprint, "keys": sorted(tensors)}
        write_tensors(self.path, tensors, {"state": json.dumps(header)}, self.max_mb)

    def load(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Mapping[str, Tensor] = NONE,
    ) -> int:
        """Put a stored state back; return the number of finished steps (0 if nothing is stored).

        Raise CheckpointError for a file that is cut short, incomplete or of another configuration.
        """
        if not self.path.exists():
            return 0
        # Read the file
        afresh = "remove it to start afresh"
        try:
            tensors, metadata = read_tensors(self.path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {afresh}") from error
        header = json.loads(metadata.get("state", "{}"))
        # Check it fits
        if header.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{self.path}: belongs to another configuration (fingerprint "
                f"{header.get('fingerprint')}, this run has {self.fingerprint}); {afresh}"
            )
        state = {f"model/{name}": tensor for name, tensor in changing(module).items()}
        state |= {f"average/{name}": tensor for name, tensor in averages.items()}
        keys = {*header["keys"], *state}
        if missing := sorted(keys - tensors.keys()):
            raise CheckpointError(
                f"{self.path}: missing {len(missing)} keys: {', '.join(missing)}; {afresh}"
            )
        # Put it back
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
        for name, parameter in trainable(module).items():
            prefix = f"optimizer/{name}/"
            optimizer.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        return int(header["step"])


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def changing(module: nn.Module) -> dict[str, Tensor]:
    """Return what training can change: trainable parameters and buffers."""
    return {**trainable(module), **dict(module.named_buffers())}
