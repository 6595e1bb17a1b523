"""Keep training state in one safetensors file, written whole, from which a run goes on bitwise.

Random numbers need no saving: every step seeds its own from (seed, step).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dmoe_var.checkpoints.safetensors_io import read_tensors, write_tensors
from dmoe_var.errors import CheckpointError

STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class StateFile:
    """The file of a state. `fingerprint` is a hash of the configuration that it belongs to."""

    path: Path
    fingerprint: str

    def save(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Store what training changes: trainable parameters, buffers, optimiser moments."""
        tensors = {f"model/{name}": tensor for name, tensor in changing(module).items()}
        for name, parameter in trainable(module).items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        header = {"step": step, "fingerprint": self.fingerprint, "keys": sorted(tensors)}
        write_tensors(self.path, tensors, {"state": json.dumps(header)})

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put a stored state back; return the number of finished steps (0 if nothing is stored).

        Raise CheckpointError for a file that is cut short, incomplete or of another configuration.
        """
        if not self.path.exists():
            return 0
        # Read the file
        try:
            tensors, metadata = read_tensors(self.path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove it to start afresh") from error
        try:
            header = json.loads(metadata["state"])
            step, fingerprint = int(header["step"]), str(header["fingerprint"])
            keys = {str(key) for key in header["keys"]}
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: not a training state; remove it to start afresh"
            ) from error
        # Check it fits
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{self.path}: belongs to another configuration (fingerprint {fingerprint}, this "
                f"run has {self.fingerprint}); remove it to start afresh"
            )
        parameters = trainable(module)
        keys |= {f"model/{name}" for name in changing(module)}
        missing = sorted(keys - tensors.keys())
        if missing:
            raise CheckpointError(
                f"{self.path}: missing {len(missing)} keys: {', '.join(missing)}; remove it to "
                "start afresh"
            )
        # Put it back
        with torch.no_grad():
            for name, tensor in changing(module).items():
                tensor.copy_(tensors[f"model/{name}"])
        for name, parameter in parameters.items():
            prefix = f"optimizer/{name}/"
            optimizer.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        return step

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def changing(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training can change: trainable parameters and buffers."""
    return {**trainable(module), **dict(module.named_buffers())}
