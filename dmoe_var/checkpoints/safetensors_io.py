"""Write and read our checkpoints: folders of model.safetensors and config.json, written whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dmoe_var.checkpoints.tensor_files import (
    keep_pieces,
    read_metadata,
    read_tensors,
    write_tensors,
)
from dmoe_var.checkpoints.var_adapter import check_size
from dmoe_var.errors import CheckpointError
from dmoe_var.files import read_json, temporary_beside, write_text
from dmoe_var.models.build import build_strictly
from dmoe_var.models.classifier import ClassifierConfig, ResNetClassifier
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE, VQVAEConfig

T = TypeVar("T")
FORMAT = "dmoe-var/1"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
READ_BY = {
    "vqvae": "load_vqvae, base.vqvae",
    "var": "load_var, base.var",
    "dynamic_var": "DynamicVAR.from_pretrained, sample.pretrained",
    "classifier": "load_classifier, base.classifier",
}
"""What reads a checkpoint of each kind, in Python and as a configuration key."""
KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "vqvae": (VQVAE, VQVAEConfig),
    "var": (VAR, VARConfig),
    "classifier": (ResNetClassifier, ClassifierConfig),
}


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into; once the block ends without an error, its files replace
    those of `folder`, in which others stay, but for older pieces of weights (see `tensor_files`).

    config.json is taken away first and put back last, so that no kill leaves a mixture that loads.
    The weights are put in place first: they tell that what a kill leaves is of a model.
    """
    folder = folder.resolve()  # a link stays, and what it points to is filled
    temporary = temporary_beside(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        folder.mkdir(exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        order, written = {MODEL_FILE: 0, CONFIG_FILE: 2}, list(temporary.iterdir())
        for path in sorted(written, key=lambda path: order.get(path.name, 1)):
            os.replace(path, folder / path.name)
        keep_pieces(folder / MODEL_FILE, [path.name for path in written])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    model: VAR | VQVAE | ResNetClassifier,
    fingerprint: str = "",
    max_mb: int | None = None,
) -> None:
    """Write a model's checkpoint folder, whole or not at all; replace an older one of that name. A
    kill while its files are put in place may leave neither (see `whole_folder`).

    fingerprint: of the configuration that made it (`read_fingerprint`). max_mb: see
    `write_tensors`. Raise CheckpointError or OSError if the disk refuses, or if something else is
    in the way.
    """
    kind = next(name for name, (cls, _) in KINDS.items() if isinstance(model, cls))
    about = {"fingerprint": fingerprint}
    with whole_folder(folder) as temporary:
        write_tensors(temporary / MODEL_FILE, model.state_dict(), about, max_mb)
        write_config(temporary, kind, dataclasses.asdict(model.config))


def write_config(folder: Path, kind: str, config: Mapping[str, Any], **about: str) -> None:
    """Write the config.json of a checkpoint. about: what else it says beside the configuration."""
    content = {"format": FORMAT, "kind": kind, **about, "config": config}
    text = json.dumps(content, indent=2, allow_nan=False)
    write_text(folder / CONFIG_FILE, text + "\n")


def read_fingerprint(folder: Path) -> str:
    """Read the fingerprint of a saved checkpoint. Raise CheckpointError if it is not whole."""
    return read_metadata(folder / MODEL_FILE).get("fingerprint", "")


def read_config(folder: Path, kind: str, cls: type[T]) -> T:
    """Read the configuration, of class `cls`, in the config.json of a checkpoint of a kind."""
    path = folder / CONFIG_FILE
    content = read_json(path, CheckpointError)
    about = content if isinstance(content, dict) else {}
    found = about.get("kind")
    if (about.get("format"), found) != (FORMAT, kind):
        others = {name: reads for name, reads in READ_BY.items() if name != kind}
        advice = f": {others[str(found)]} take it" if str(found) in others else ""
        raise CheckpointError(
            f"{path}: format={about.get('format')!r}, kind={found!r}; expected {FORMAT!r} and "
            f"{kind!r}{advice}"
        )
    try:
        # As JSON text, for which strict still takes a list for a tuple
        text = json.dumps(about.get("config"))
        adapter: TypeAdapter[T] = TypeAdapter(cls)
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("config", *first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from error


def load_checkpoint(source: Path, kind: str) -> nn.Module:
    """Load a model from a checkpoint folder, or from the file of weights in one, strictly, on the
    CPU, in eval mode."""
    path = source / MODEL_FILE if source.is_dir() else source
    model, config_class = KINDS[kind]
    config: VARConfig | VQVAEConfig | ClassifierConfig
    config = read_config(path.parent, kind, config_class)
    tensors, _ = read_tensors(path)
    if not isinstance(config, ClassifierConfig):  # whose size has limits
        check_size(config, tensors, str(path))
    return build_strictly(lambda: model(config), tensors, path)


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
