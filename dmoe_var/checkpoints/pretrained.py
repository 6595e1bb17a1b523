"""Save whole dynamic models as folders that the Hugging Face Hub can hold, and load them.

A folder holds model.safetensors (tensors by their state-dict names), config.json (both shapes, the
scales, the selection rules) and README.md, the model card. What both models share is stored once.
The file's metadata names each left-out tensor's twin, as safetensors' own save_model does.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from dmoe_var.checkpoints.file_kinds import kind_of_file
from dmoe_var.checkpoints.hub import network_errors
from dmoe_var.checkpoints.safetensors_io import (
    CONFIG_FILE,
    FORMAT,
    MODEL_FILE,
    READ_BY,
    read_tensors,
    recover,
    write_tensors,
)
from dmoe_var.checkpoints.var_adapter import check_size
from dmoe_var.errors import CheckpointError
from dmoe_var.files import read_json
from dmoe_var.models.build import build_strictly
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.moe.selection import selection_from_json, selection_to_json

KIND = "dynamic_var"
CARD_FILE = "README.md"
FILES = (MODEL_FILE, CONFIG_FILE, CARD_FILE)
EXPORTED = "dynamic_var"
"""Name that the export stage gives to a saved model's folder."""
FRAMEWORK = {"format": "pt"}
"""Entry of a file's metadata that the hub's tools look for; the others name shared tensors."""


@dataclass(frozen=True)
class DynamicVARConfig:
    """What config.json says of a DynamicVAR. selection: plain values, see `selection_to_json`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    dense: VARConfig
    moe: VARConfig
    moe_scales: tuple[int, ...]
    selection: Any = None


def write_model(model: DynamicVAR, folder: str | Path, card: str) -> None:
    """Write a model's folder whole or not at all. card: the text of its README.md.

    In an existing folder only the files of a saved model are replaced: hidden and other files stay.
    Raise CheckpointError if there are other files and no saved model, or if writing fails.
    """
    _write_folder(model, Path(folder).resolve(), str(folder), card)


def from_pretrained(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> DynamicVAR:
    """Load a model in eval mode on the CPU, its weights memory-mapped, from a folder or the hub.

    source: a folder of `save_pretrained` (or the file of weights in it, or the folder of the export
    stage around it), or a hub repository ("owner/name"). revision: the repository's branch, tag or
    commit. cache_dir, local_files_only and token are huggingface_hub's.
    Only numbers are read, strictly. Raise CheckpointError, in one line, for anything missing,
    unexpected, cut short or out of range, or if the hub cannot be reached.
    """
    local = _local(source)
    if local is not None:
        if revision is not None:
            raise CheckpointError(
                f"revision={revision}: {source} is a folder; a revision is for hub repositories"
            )
        return _load_folder(local)
    return _load_folder(_download(str(source), revision, cache_dir, local_files_only, token))


def locate(source: str) -> Path:
    """Find the folder of a saved model on this machine; fetch it from the hub if it is missing."""
    return _local(source) or _fetched(source)


@cache
def _fetched(repo_id: str) -> Path:
    return _download(repo_id, None, None, False, None)


def _local(source: str | Path) -> Path | None:
    """Find the folder that a path stands for; return None for what is no path here."""
    try:
        path = Path(source).expanduser()
        if path.name:
            recover(path)
        if path.is_file():
            if path.name not in FILES:
                what = kind_of_file(path)
                raise CheckpointError(f"{source}: a file ({what}); a saved DynamicVAR is a folder")
            return path.parent
        if not path.is_dir():
            return None
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        return None
    inner = path / EXPORTED
    return inner if (inner / CONFIG_FILE).is_file() and not (path / CONFIG_FILE).exists() else path


def upload(
    model: DynamicVAR,
    repo_id: str,
    card: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Add a DynamicVAR",
) -> str:
    """Upload what `write_model` writes, in one commit, and return the commit's address.

    The repository is made if there is none (`private`: None means the owner's default).
    Raise CheckpointError, in one line, if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(model, folder, card)
        with _hub_errors(f"{repo_id}: cannot be uploaded"):
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=made.repo_id, folder_path=folder, commit_message=commit_message
            )
    return str(commit.commit_url)


def _write_folder(model: DynamicVAR, folder: Path, shown: str, card: str) -> None:
    """Write beside `folder`, then rename. shown: its name in messages."""
    config = json.dumps(_config(model), indent=2, allow_nan=False) + "\n"
    replaced = recover(folder)
    _keep_foreign(replaced, folder)
    _check_replaceable(folder, shown)
    temporary = folder.with_name(f".{folder.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors, twins = _without_twins(model.state_dict())
        write_tensors(temporary / MODEL_FILE, tensors, FRAMEWORK | twins)
        (temporary / CONFIG_FILE).write_text(config, encoding="utf-8")
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        _keep_foreign(replaced, folder)
    except OSError as error:
        raise CheckpointError(f"{shown}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _config(model: DynamicVAR) -> dict[str, Any]:
    try:
        selection = selection_to_json(model.selection)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    scales = model.replaced_scales
    stored = DynamicVARConfig(model.dense.config, model.moe.config, scales, selection)
    about = {"format": FORMAT, "kind": KIND, "library_version": _version()}
    return {**about, "config": asdict(stored)}


def _version() -> str:
    """Return this library's version; "unknown" if it is not installed."""
    try:
        return metadata.version("dmoe-var")
    except metadata.PackageNotFoundError:
        return "unknown"


def _check_replaceable(folder: Path, shown: str) -> None:
    """Raise CheckpointError for a file, and for a folder with files but without the config.json of
    a saved model. Hidden files are no obstacle."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{shown}: is a file; a model needs a folder")
    inside = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if CONFIG_FILE not in inside and inside:
        raise CheckpointError(
            f"{shown}: not replaced, it holds other files than a saved model's: {inside[0]}"
            + (f" and {len(inside) - 1} more" if len(inside) > 1 else "")
        )
    if inside:
        try:
            _read_config(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{shown}: not replaced, no saved model ({error})") from error


def _keep_foreign(replaced: Path, folder: Path) -> None:
    """Move what is no file of a saved model from the folder's older state to the newer one. After a
    kill in between, the next save does it."""
    if not replaced.is_dir() or not folder.is_dir():
        return
    for path in replaced.iterdir():
        if path.name not in FILES and not (folder / path.name).exists():
            os.replace(path, folder / path.name)


def _without_twins(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep each tensor under its first name alone; also return that name by every other one."""
    first: dict[object, str] = {}
    twins: dict[str, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        memory = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        kept = first.setdefault(memory if tensor.numel() else name, name)
        if kept != name:
            twins[name] = kept
    return {name: tensor for name, tensor in tensors.items() if name not in twins}, twins


def _with_twins(
    tensors: Mapping[str, Tensor], about: Mapping[str, str], path: Path
) -> dict[str, Tensor]:
    """Undo `_without_twins`; a name whose twin is not there stays missing."""
    twins = {name: kept for name, kept in about.items() if name not in FRAMEWORK}
    both = sorted(twins.keys() & tensors.keys())
    if both:
        raise CheckpointError(f"{path}: {', '.join(both)}: there, and said to be left out")
    found = {name: tensors[kept] for name, kept in twins.items() if kept in tensors}
    return {**tensors, **found}


def _load_folder(folder: Path) -> DynamicVAR:
    config = _read_config(folder)
    path = folder / MODEL_FILE
    tensors = _with_twins(*read_tensors(path), path)
    for name, shape in (("dense", config.dense), ("moe", config.moe)):
        prefix = f"{name}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        check_size(shape, own, f"{path}: {name}")
    both = build_strictly(
        lambda: nn.ModuleDict({"dense": VAR(config.dense), "moe": VAR(config.moe)}), tensors, path
    )
    dense, moe = both["dense"], both["moe"]
    assert isinstance(dense, VAR)
    assert isinstance(moe, VAR)
    try:
        selection = selection_from_json(config.selection)
        return DynamicVAR(dense, moe, config.moe_scales, selection).eval()
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: config: {error}") from error


def _read_config(folder: Path) -> DynamicVARConfig:
    path = folder / CONFIG_FILE
    content = read_json(path, CheckpointError)
    about = content if isinstance(content, dict) else {}
    if (about.get("format"), about.get("kind")) != (FORMAT, KIND):
        kind = about.get("kind")
        advice = f": {READ_BY[kind]} take it" if kind in READ_BY and kind != KIND else ""
        raise CheckpointError(
            f"{path}: format={about.get('format')!r}, kind={kind!r}; expected {FORMAT!r} and "
            f"{KIND!r}{advice}"
        )
    try:
        # As JSON text, for which strict still takes a list for a tuple
        stored: DynamicVARConfig = TypeAdapter(DynamicVARConfig).validate_json(
            json.dumps(about.get("config")), strict=True
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("config", *first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from error
    return stored


def _download(
    repo_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    """Fetch one commit's weights and configuration, nothing else; return their cache folder."""
    from huggingface_hub import snapshot_download

    with _hub_errors(f"{repo_id}: no such folder, and cannot be fetched from the hub"):
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=[MODEL_FILE, CONFIG_FILE],
            )
        )


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Do as `network_errors`, and raise CheckpointError for an impossible repository name too."""
    from huggingface_hub.errors import HFValidationError

    try:
        with network_errors(what):
            yield
    except HFValidationError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{what} ({reason})") from error
