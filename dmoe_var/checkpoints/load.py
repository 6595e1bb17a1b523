"""Load a VQ-VAE or a VAR from a published file or name, or from a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from dmoe_var import values
from dmoe_var.checkpoints import hub, var_adapter
from dmoe_var.checkpoints.file_kinds import kind_of_file
from dmoe_var.checkpoints.safetensors_io import (
    CONFIG_FILE,
    MODEL_FILE,
    is_described,
    load_checkpoint,
    read_bare,
)
from dmoe_var.checkpoints.state_dicts import meant, read_pth
from dmoe_var.checkpoints.tensor_files import read_tensors
from dmoe_var.errors import CheckpointError
from dmoe_var.models.build import build_strictly
from dmoe_var.models.classifier import ResNetClassifier
from dmoe_var.models.pair import check_pair
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE

PACKAGED = Path(__file__).parent / "packaged"
"""Base models that this package carries, NAME/vqvae and NAME/var."""
PREFIXES = {"vqvae": "vae_", "var": "var_"}
"""How published names of each kind begin; there are none of other kinds."""
CHECKPOINT = "checkpoint"
"""Folder of the model within the folder of a finished stage."""
OFFERED = (f"*/{CHECKPOINT}", "*.pth", "*.pt", "*.safetensors", "snapshots/*")
"""What an error offers instead of a folder around it: stages, files, what the hub's cache holds."""


def _packaged() -> list[str]:
    """List the names of the base models that this package carries."""
    return sorted(folder.name for folder in PACKAGED.iterdir()) if PACKAGED.is_dir() else []


def _locate(source: str | Path, kind: str) -> Path:
    """Find the file or folder that a name ("digits") or a path ("./digits") stands for."""
    if is_name(source):
        name = str(source)
        if name not in model_names(kind):
            allowed = ", ".join(model_names(kind))
            raise CheckpointError(f"{name}: holds no {kind}; names that do are {allowed}")
        return hub.fetch(name) if name in hub.PUBLISHED else PACKAGED / name / kind
    try:
        path = Path(source).expanduser()
        there = source != "" and path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a null byte, of no such user
        there = False
    if there:
        return _within(path)
    raise CheckpointError(
        f"{str(source)[:200] or repr(source)}: no such file or folder; names are "
        f"{', '.join(model_names(kind))}"
    )


def model_names(kind: str) -> list[str]:
    """List the packaged and published models of a kind."""
    packaged = [name for name in _packaged() if (PACKAGED / name / kind).is_dir()]
    return packaged + [name for name in hub.PUBLISHED if name.startswith(PREFIXES.get(kind, "-"))]


def _within(path: Path) -> Path:
    """Return a file as it is, and for a folder the checkpoint folder that it is or contains.

    A finished stage's folder contains one. Raise CheckpointError, which says what to give, for a
    folder of such folders or of files.
    """
    if not path.is_dir() or any((path / name).exists() for name in (CONFIG_FILE, MODEL_FILE)):
        return path
    if (path / CHECKPOINT / CONFIG_FILE).is_file():
        return path / CHECKPOINT
    inside = [found for pattern in OFFERED for found in sorted(path.glob(pattern))]
    choice = ", ".join(map(str, inside[:8]))
    raise CheckpointError(
        f"{path}: no checkpoint, it has no {CONFIG_FILE} and {MODEL_FILE}"
        + (f"; give one of {choice}" if choice else "")
    )


def weights_file(source: str | Path, kind: str) -> Path:
    """Find the file with the weights of a source of `kind` "vqvae" or "var" (for its hash)."""
    path = _locate(source, kind)
    return path / MODEL_FILE if path.is_dir() else path


def is_name(source: str | Path) -> bool:
    """Tell whether a source is a name, of a published or packaged model, and not a path."""
    return source in (*_packaged(), *hub.PUBLISHED)


def cached_file(source: str | Path, kind: str) -> Path | None:
    """Do as `weights_file` without fetching; return None for what is not on this machine."""
    if source in hub.PUBLISHED:
        return hub.cached(str(source))
    return weights_file(source, kind)


def file_dtype(source: str | Path, kind: str) -> str:
    """Read the precision that a source's weights have in its file: "bfloat16"."""
    path = weights_file(source, kind)
    tensors = _read(path, kind).values()
    found = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.ndim > 1}
    return ", ".join(sorted(name for name in found if "float" in name))


def _read(path: Path, kind: str) -> dict[str, Tensor]:
    """Read the state dict of a kind from a file of safetensors or torch."""
    if kind_of_file(path) == "torch":
        return read_pth(path, kind)
    tensors = read_tensors(path)[0] if is_described(path) else read_bare(path)
    return meant(tensors, kind, path)


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """Raise errors about impossible shapes as CheckpointError, which names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not the shapes of a published model: {error}") from error


def load_vqvae(source: str | Path, patch_nums: Sequence[int] | None = None) -> VQVAE:
    """Load a VQ-VAE in eval mode on the CPU, in the precision of its file.

    source: a file of published weights (.pth, .safetensors, or what the published trainer saves), a
    checkpoint of ours (its folder, that of its stage, or the .safetensors file in it), a published
    name ("vae_ch160v4096z32") or the name of one that the package carries ("digits"). The content
    of a file tells what it is. patch_nums: None means the 256 px schedule for a published file,
    which does not hold it, and else what the folder says. Raise CheckpointError if anything does
    not fit.
    """
    if patch_nums is not None:
        patch_nums = values.whole_numbers("patch_nums", patch_nums, 1)
    path = _locate(source, "vqvae")
    if not _is_ours(path):
        tensors = _read(path, "vqvae")
        with _as_checkpoint_error(path):
            config = var_adapter.vqvae_config(tensors, patch_nums, str(path))
            tensors = var_adapter.fit_counter(tensors, config.patch_nums)
            return build_strictly(lambda: VQVAE(config), tensors, path)
    model = load_checkpoint(path, "vqvae")
    assert isinstance(model, VQVAE)
    if patch_nums is not None and tuple(patch_nums) != model.config.patch_nums:
        ours, theirs = tuple(patch_nums), model.config.patch_nums
        raise CheckpointError(f"{path}: patch_nums={ours}, but the checkpoint has {theirs}")
    return model


def load_var(source: str | Path, vqvae: VQVAE | None = None) -> VAR:
    """Load a VAR (dense, or with experts from a checkpoint of ours) in eval mode on the CPU, in the
    precision of its file.

    source: as for `load_vqvae`, e.g. "var_d16". vqvae: if given, the two are checked to belong
    together. Raise CheckpointError if anything does not fit.
    """
    path = _locate(source, "var")
    if _is_ours(path):
        model = load_checkpoint(path, "var")
        assert isinstance(model, VAR)
    else:
        tensors = _read(path, "var")
        with _as_checkpoint_error(path):
            config = var_adapter.var_config(tensors, str(path))
            model = build_strictly(lambda: VAR(config), tensors, path)
    if vqvae is not None:
        with _as_checkpoint_error(path):
            check_pair(vqvae, model.config)
    return model


def load_classifier(source: str | Path) -> ResNetClassifier:
    """Load a classifier in eval mode on the CPU from a checkpoint of ours: its folder, that of its
    stage, or the .safetensors file in it. Raise CheckpointError if anything does not fit."""
    model = load_checkpoint(_locate(source, "classifier"), "classifier")
    assert isinstance(model, ResNetClassifier)
    return model


def _is_ours(path: Path) -> bool:
    """Tell whether a config.json of ours says what the weights are; a folder counts as such."""
    return path.is_dir() or (kind_of_file(path) == "safetensors" and is_described(path))
