"""Write and read our checkpoints: folders of model.safetensors and config.json, written whole."""

from __future__ import annotations

import dataclasses
import errno
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

from dmoe_var.checkpoints.file_kinds import kind_of_file
from dmoe_var.checkpoints.var_adapter import check_size
from dmoe_var.errors import CheckpointError
from dmoe_var.files import read_json, whole_file, write_text
from dmoe_var.models.build import _first_line, build_strictly
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE, VQVAEConfig

FORMAT = "dmoe-var/1"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
RENAMES = 10
"""Tries at replacing a checkpoint that others are reading."""
READ_BY = {
    "vqvae": "load_vqvae, base.vqvae",
    "var": "load_var, base.var",
    "dynamic_var": "DynamicVAR.from_pretrained, sample.pretrained",
}
"""What reads a checkpoint of each kind, in Python and as a configuration key."""
KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "vqvae": (VQVAE, VQVAEConfig),
    "var": (VAR, VARConfig),
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all. Raise CheckpointError if the disk refuses."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(contiguous, temporary, metadata)
            temporary.chmod(mode)  # safetensors leaves files that the owner alone can read
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be written ({_first_line(error)})") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file's tensors (memory-mapped) and metadata, or raise CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if kind_of_file(path) != "safetensors":
        raise CheckpointError(f"{path}: a file of torch (.pth), no safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = _first_line(error)
        raise CheckpointError(f"{path}: cut short or no safetensors file ({reason})") from error


def recover(folder: Path) -> Path:
    """Put the older folder back if a kill came between the two renames of `save_checkpoint`.

    Return the path that an older checkpoint has while it is being replaced.
    """
    replaced = folder.with_name(f".{folder.name}.old")
    if replaced.exists() and not folder.exists():
        os.replace(replaced, folder)
    return replaced


def save_checkpoint(folder: Path, model: VAR | VQVAE, fingerprint: str = "") -> None:
    """Write a model's checkpoint folder, whole or not at all; replace an older one of that name.

    fingerprint: of the configuration that made it (`read_fingerprint`). Raise CheckpointError if
    the disk refuses, or if something else is in the way.
    """
    folder = folder.resolve()  # a link stays, and what it points to is replaced
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file is where a checkpoint folder should go")
    kind = next(name for name, (cls, _) in KINDS.items() if isinstance(model, cls))
    config = {"format": FORMAT, "kind": kind, "config": dataclasses.asdict(model.config)}
    about = {"fingerprint": fingerprint}  # one entry: safetensors writes several in any order
    temporary = folder.with_name(f".{folder.name}.tmp")
    for leftover in (temporary, recover(folder)):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_tensors(temporary / MODEL_FILE, model.state_dict(), about)
        write_text(temporary / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename over an older folder; try again if a reader put the older one back in between."""
    for _ in range(RENAMES):
        replaced = recover(folder)
        if folder.exists():
            os.replace(folder, replaced)
        try:
            os.replace(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        shutil.rmtree(replaced, ignore_errors=True)
        return
    raise CheckpointError(f"{folder}: is being read all the time, and could not be replaced")


def read_fingerprint(folder: Path) -> str:
    """Read the fingerprint of a saved checkpoint. Raise CheckpointError if it is not whole."""
    path = folder / MODEL_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint", "")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: missing, cut short or no safetensors file ({_first_line(error)})"
        ) from error


def read_config(folder: Path, kind: str) -> Any:
    """Read the model configuration of a checkpoint folder (a VQVAEConfig or VARConfig)."""
    path = folder / CONFIG_FILE
    content = read_json(path, CheckpointError)
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind or content.get("format") != FORMAT:
        advice = f": {READ_BY[found]} take it" if found in READ_BY else ""
        raise CheckpointError(
            f"{path}: kind={found!r}, expected a {FORMAT} checkpoint of {kind!r}{advice}"
        )
    try:
        return TypeAdapter(KINDS[kind][1]).validate_python(content.get("config"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: config.{where}: {first['msg']}") from error


def load_checkpoint(folder: Path, kind: str, name: str = MODEL_FILE) -> nn.Module:
    """Load a model from a checkpoint folder, strictly, on the CPU, in eval mode. name: the file
    there that holds the weights."""
    if folder.absolute().name:  # "/" has none, and no place beside it
        recover(folder.absolute())
    config, path = read_config(folder, kind), folder / name
    tensors, _ = read_tensors(path)
    check_size(config, tensors, str(path))
    return build_strictly(lambda: KINDS[kind][0](config), tensors, path)


def is_described(path: Path) -> bool:
    """Tell whether a config.json of ours lies beside a file of weights and describes them."""
    config = path.parent / CONFIG_FILE
    content = read_json(config, CheckpointError) if config.is_file() else None
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_bare(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file that no config.json describes: published weights in that format.

    Raise CheckpointError for a file of ours: its names do not tell all of its model, and a ReLU
    would be taken for a GELU.
    """
    tensors, about = read_tensors(path)
    if "state" in about:
        raise CheckpointError(
            f"{path}: the state of a training that is not finished, no model; the finished one is "
            "in checkpoint/"
        )
    if "fingerprint" in about:
        raise CheckpointError(
            f"{path}: a checkpoint of ours without its {CONFIG_FILE} beside it, which says what "
            "the weights do not (the activation, say); give its folder, or put that file there"
        )
    return tensors
