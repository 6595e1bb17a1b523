"""Checkpoints of ours: a folder of model.safetensors and config.json, whole or not there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dmoe_var.errors import CheckpointError
from dmoe_var.files import whole_file, write_text
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE, VQVAEConfig

Model = TypeVar("Model", bound=nn.Module)

FORMAT = "dmoe-var/1"
MODEL_FILE = "model.safetensors"
KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "vqvae": (VQVAE, VQVAEConfig),
    "var": (VAR, VARConfig),
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all; CheckpointError where the disk refuses."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(contiguous, temporary, metadata)
            temporary.chmod(mode)  # safetensors leaves files that the owner alone can read
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be written ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped) and metadata of a safetensors file, or CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = _first_line(error)
        raise CheckpointError(f"{path}: cut short or no safetensors file ({reason})") from error


def check_fit(wanted: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """CheckpointError that names in one line what of a state dict does not fit a module."""
    wants = {name: tuple(t.shape) for name, t in wanted.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    problems = []
    for title, names in (
        ("missing", sorted(wants.keys() - given.keys())),
        ("unexpected", sorted(given.keys() - wants.keys())),
    ):
        if names:
            problems.append(f"{title} {len(names)} keys: {', '.join(names)}")
    shapes = [
        f"{name} is {given[name]}, should be {wants[name]}"
        for name in sorted(wants.keys() & given.keys())
        if wants[name] != given[name]
    ]
    if shapes:
        problems.append(f"{len(shapes)} wrong shapes: {'; '.join(shapes)}")
    kinds = [
        f"{name} is {tensors[name].dtype}, {tensors[name].layout}"
        for name, tensor in wanted.state_dict().items()
        if name in tensors and not _same_kind(tensor, tensors[name])
    ]
    if kinds:
        problems.append(f"{len(kinds)} wrong types: {'; '.join(kinds)}")
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")


def _same_kind(a: Tensor, b: Tensor) -> bool:
    """Both dense, and both of floating point or both not."""
    return a.layout == b.layout and a.is_floating_point() == b.is_floating_point()


class _WithoutInitialValues(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it has nothing to fill, and its first normal_ there
    would import torch's compiler (160 MB)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_strictly(
    build: Callable[[], Model], tensors: Mapping[str, Tensor], source: Path | str
) -> Model:
    """The module that `build` makes, in eval mode, with these very tensors: no copy, no second
    set of weights (it is built on the meta device). CheckpointError where they do not fit."""
    with torch.device("meta"), _WithoutInitialValues():
        model = build()
    check_fit(model, tensors, source)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def recover(folder: Path) -> Path:
    """Where a kill came between the two renames of `save_checkpoint`, put the older one back.

    Returns the path that an older checkpoint has while it is being replaced.
    """
    replaced = folder.with_name(f".{folder.name}.old")
    if replaced.exists() and not folder.exists():
        os.replace(replaced, folder)
    return replaced


def save_checkpoint(folder: Path, model: VAR | VQVAE, fingerprint: str = "") -> None:
    """Write a model's checkpoint folder; an older one of that name is replaced.

    fingerprint: of the configuration that made it (`read_fingerprint`).
    """
    kind = next(name for name, (cls, _) in KINDS.items() if isinstance(model, cls))
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = recover(folder)
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    about = {"fingerprint": fingerprint}  # one entry: safetensors writes several in any order
    write_tensors(temporary / MODEL_FILE, model.state_dict(), about)
    config = {"format": FORMAT, "kind": kind, "config": dataclasses.asdict(model.config)}
    write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def read_fingerprint(folder: Path) -> str:
    """The fingerprint that a checkpoint was saved with; CheckpointError where it is not whole."""
    path = folder / MODEL_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint", "")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: missing, cut short or no safetensors file ({_first_line(error)})"
        ) from error


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
    tensors, _ = read_tensors(folder / MODEL_FILE)
    return build_strictly(lambda: KINDS[kind][0](config), tensors, folder / MODEL_FILE)
