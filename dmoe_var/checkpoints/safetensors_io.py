"""Checkpoints of ours: a folder of model.safetensors and config.json, whole or not there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dmoe_var.errors import CheckpointError
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE, VQVAEConfig

FORMAT = "dmoe-var/1"
KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "vqvae": (VQVAE, VQVAEConfig),
    "var": (VAR, VARConfig),
}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata)
    os.replace(temporary, path)


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; CheckpointError where it cannot be read."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cut short or no safetensors file ({reason})") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """load_state_dict that names in one line what does not fit, and where."""
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    problems = []
    for title, names in (
        ("missing", sorted(wanted.keys() - given.keys())),
        ("unexpected", sorted(given.keys() - wanted.keys())),
    ):
        if names:
            problems.append(f"{title} {len(names)} keys: {', '.join(names)}")
    shapes = [
        f"{name} is {given[name]}, should be {wanted[name]}"
        for name in sorted(wanted.keys() & given.keys())
        if wanted[name] != given[name]
    ]
    if shapes:
        problems.append(f"{len(shapes)} wrong shapes: {'; '.join(shapes)}")
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")
    module.load_state_dict(tensors)


def recover(folder: Path) -> Path:
    """Where a kill came between the two renames of `save_checkpoint`, put the older one back.

    Returns the path that an older checkpoint has while it is being replaced.
    """
    replaced = folder.with_name(f".{folder.name}.old")
    if replaced.exists() and not folder.exists():
        os.replace(replaced, folder)
    return replaced


def save_checkpoint(folder: Path, model: VAR | VQVAE) -> None:
    """Write a model's checkpoint folder; an older one of that name is replaced."""
    kind = next(name for name, (cls, _) in KINDS.items() if isinstance(model, cls))
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = recover(folder)
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(temporary / "model.safetensors", model.state_dict(), {"format": FORMAT})
    config = {"format": FORMAT, "kind": kind, "config": dataclasses.asdict(model.config)}
    write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def read_config(folder: Path, kind: str) -> Any:
    """The model configuration of a checkpoint folder (a VQVAEConfig or VARConfig)."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: no such file; is {folder} a checkpoint?") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cut short or no JSON file ({error})") from error
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: kind={found!r}, expected a {FORMAT} checkpoint of {kind!r}")
    try:
        return TypeAdapter(KINDS[kind][1]).validate_python(content.get("config"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: config.{where}: {first['msg']}") from error


def load_checkpoint(folder: Path, kind: str) -> nn.Module:
    """A model from a checkpoint folder, strictly, on the CPU, in eval mode."""
    recover(folder)
    config = read_config(folder, kind)
    tensors, _ = read_tensors(folder / "model.safetensors")
    model = KINDS[kind][0](config)
    load_strictly(model, tensors, folder / "model.safetensors")
    return model.eval()
