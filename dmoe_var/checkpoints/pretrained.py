"""Save whole dynamic models as folders that the Hugging Face Hub can hold, and load them.

A folder holds model.safetensors (tensors by their state-dict names), config.json (both shapes, the
scales, the selection rules, what means of skipped experts are of, the recipe) and README.md, the
model card.
What both models share is stored once.
The file's metadata names each left-out tensor's twin, as safetensors' own save_model does.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import nn

from dmoe_var.checkpoints.hub import network_errors
from dmoe_var.checkpoints.load import PACKAGED, is_name
from dmoe_var.checkpoints.safetensors_io import (
    CONFIG_FILE,
    MODEL_FILE,
    read_config,
    whole_folder,
    write_config,
)
from dmoe_var.checkpoints.tensor_files import read_tensors, write_tensors
from dmoe_var.checkpoints.var_adapter import check_size
from dmoe_var.errors import CheckpointError
from dmoe_var.models.build import build_strictly
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.recipe import Recipe
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.moe.selection import selection_from_json, selection_to_json
from dmoe_var.moe.skipped_means import SkippedMeans

KIND = "dynamic_var"
CARD_FILE = "README.md"
FILES = (MODEL_FILE, CONFIG_FILE, CARD_FILE)
EXPORTED = "dynamic_var"
"""Name that the export stage gives to a saved model's folder."""
FRAMEWORK = {"format": "pt"}
"""Entry of a file's metadata that the hub's tools look for; the others name shared tensors."""
DENSE_BESIDE = {"dense": "../var"}
"""Entry for a packaged model, whose dense weights are those of the base VAR that lies beside it."""


@dataclass(frozen=True)
class SkippedConfig:
    """What config.json says of `SkippedMeans`. selection: as in `DynamicVARConfig`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    selection: Any = None


@dataclass(frozen=True)
class DynamicVARConfig:
    """What config.json says of a DynamicVAR. selection: plain values, see `selection_to_json`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    dense: VARConfig
    moe: VARConfig
    moe_scales: tuple[int, ...]
    selection: Any = None
    skipped: SkippedConfig | None = None
    """Left out if there are no means."""
    recipe: Recipe = field(default_factory=Recipe)
    """Left out if it is the published one."""


def write_model(
    model: DynamicVAR, folder: str | Path, card: str, *, dense_beside: bool = False
) -> None:
    """Write a model's folder whole or not at all. card: the text of its README.md. dense_beside:
    leave out the dense weights, which are in ../var.

    In an existing folder only the files of a saved model are replaced: hidden and other files stay.
    Raise CheckpointError if there are other files and no saved model, or if writing fails.
    """
    folder = Path(folder)
    means, skipped = model.skipped, None
    try:
        selection = selection_to_json(model.selection)
        if means is not None:
            skipped = SkippedConfig(selection_to_json(means.selection))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    scales = model.replaced_scales
    shapes = (model.dense.config, model.moe.config)
    content = asdict(DynamicVARConfig(*shapes, scales, selection, skipped, model.recipe))
    if skipped is None:
        del content["skipped"]
    if model.recipe == Recipe():
        del content["recipe"]
    twins = {f"moe.{name}": f"dense.{name}" for name in model.shared_names}
    tensors = {name: t for name, t in model.state_dict().items() if name not in twins}
    about = FRAMEWORK | twins
    if dense_beside:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("dense.")}
        about |= DENSE_BESIDE
    try:
        _check_replaceable(folder)
        with whole_folder(folder) as temporary:
            write_tensors(temporary / MODEL_FILE, tensors, about)
            write_config(temporary, KIND, content, library_version=_version())
            (temporary / CARD_FILE).write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from error


def from_pretrained(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> DynamicVAR:
    """Load a model in eval mode on the CPU, its weights memory-mapped, from a folder or the hub.

    source: a folder of `save_pretrained` (or the file of weights in it, or the folder of the export
    stage around it), the name of a model that this package carries ("cifar10"), or a hub repository
    ("owner/name"). revision: the repository's branch, tag or commit. cache_dir, local_files_only
    and token are huggingface_hub's.
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
    """Find the folder that a name or a path stands for; return None for what is neither here."""
    if is_name(source) and (PACKAGED / source / EXPORTED).is_dir():
        return PACKAGED / source / EXPORTED
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (ValueError, OSError, RuntimeError):  # too long, with a null byte, of no such user
        return None
    if is_file:
        if path.name not in FILES:
            raise CheckpointError(f"{source}: a file; a saved DynamicVAR is a folder")
        return path.parent
    if not is_folder:
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
        with network_errors(f"{repo_id}: cannot be uploaded"):
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=made.repo_id, folder_path=folder, commit_message=commit_message
            )
    return str(commit.commit_url)


def _version() -> str:
    """Return this library's version; "unknown" if it is not installed."""
    try:
        return metadata.version("dmoe-var")
    except metadata.PackageNotFoundError:
        return "unknown"


def _check_replaceable(folder: Path) -> None:
    """Raise CheckpointError for a folder with files but without the config.json of a saved model.
    Hidden files are no obstacle, nor is what a save leaves that is killed before config.json."""
    inside = sorted(path.name for path in folder.glob("[!.]*"))
    if CONFIG_FILE in inside:
        try:
            read_config(folder, KIND, DynamicVARConfig)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: not replaced, no saved model ({error})") from error
    elif inside and not {MODEL_FILE} <= {*inside} <= {*FILES}:
        raise CheckpointError(
            f"{folder}: not replaced, it holds other files than a saved model's: {inside[0]}"
        )


def _load_folder(folder: Path) -> DynamicVAR:
    config = read_config(folder, KIND, DynamicVARConfig)
    path = folder / MODEL_FILE
    tensors, about = read_tensors(path)
    if about.items() >= DENSE_BESIDE.items():
        dense_path = folder / DENSE_BESIDE["dense"] / MODEL_FILE
        tensors |= {f"dense.{name}": t for name, t in read_tensors(dense_path)[0].items()}
    doubled = sorted(about.keys() & tensors.keys())
    if doubled:
        raise CheckpointError(f"{path}: {', '.join(doubled)}: there, and said to be left out")
    # A name whose twin is not there stays missing
    tensors |= {name: tensors[kept] for name, kept in about.items() if kept in tensors}
    for name, shape in (("dense", config.dense), ("moe", config.moe)):
        prefix = f"{name}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        check_size(shape, own, f"{path}: {name}")

    def parts() -> nn.ModuleDict:
        models = {"dense": VAR(config.dense), "moe": VAR(config.moe)}
        return nn.ModuleDict({**models, "skipped": _no_means(config)} if config.skipped else models)

    both = build_strictly(parts, tensors, path)
    dense, moe = both["dense"], both["moe"]
    assert isinstance(dense, VAR)
    assert isinstance(moe, VAR)
    try:
        selection = selection_from_json(config.selection)
        model = DynamicVAR(dense, moe, config.moe_scales, selection).eval()
        if config.skipped is not None:
            skipped = both["skipped"]
            assert isinstance(skipped, SkippedMeans)
            skipped.selection = selection_from_json(config.skipped.selection)
            model.set_skipped(skipped)
        model.recipe = config.recipe
        return model
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: config: {error}") from error


def _no_means(config: DynamicVARConfig) -> SkippedMeans:
    """Build means of the model's shape, without values."""
    shape = (config.moe.depth, config.moe.num_experts, config.moe.C)
    return SkippedMeans({si: torch.empty(shape) for si in config.moe_scales})


def _download(
    repo_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    """Fetch one commit's weights and configuration, nothing else; return their cache folder."""
    from huggingface_hub import snapshot_download

    with network_errors(f"{repo_id}: no such folder, and cannot be fetched from the hub"):
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
