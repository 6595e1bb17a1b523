"""`load_vqvae` and `load_var`: from a published file or name, or from a checkpoint of ours."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dmoe_var import values
from dmoe_var.checkpoints import hub, var_adapter
from dmoe_var.checkpoints.safetensors_io import MODEL_FILE, build_strictly, load_checkpoint
from dmoe_var.errors import CheckpointError
from dmoe_var.models.var import VAR, check_pair
from dmoe_var.models.vqvae import VQVAE

PACKAGED = Path(__file__).parent / "packaged"
"""Base models that this package carries, NAME/vqvae and NAME/var."""


def _read_pth(path: Path) -> dict[str, Tensor]:
    """State dict of a .pth file: tensors only, never code; memory-mapped, so that loading holds
    the weights once (compressed files and those in torch's format before 1.6 are read)."""
    try:
        content = torch.load(
            str(path), map_location="cpu", weights_only=True, mmap=_can_be_mapped(path)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, holds something else than plain tensors, or no state dict at all"
        ) from error
    except Exception as error:  # a broken file makes the readers raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path}: cut short or no state dict ({reason})") from error
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )
    if not plain:
        found = ", ".join(map(str, content))[:80] if isinstance(content, dict) else type(content)
        raise CheckpointError(f"{path}: not a state dict of tensors (found {found})")
    tensors = {name: _in_order(tensor.detach()) for name, tensor in content.items()}
    _check_storage(tensors, path)
    return tensors


def _in_order(tensor: Tensor) -> Tensor:
    """Channels-last weights of convolutions in the usual order; all else as it is."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous() if last else tensor


def _can_be_mapped(path: Path) -> bool:
    """Whether a file is a zip archive without compression: torch would map packed bytes as well."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _check_storage(tensors: dict[str, Tensor], path: Path) -> None:
    """CheckpointError for tensors that are not plain numbers in memory of their own."""
    problems: list[str] = []
    places: list[tuple[int, int, str]] = []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            problems.append(f"{name} holds no plain numbers")
        elif not tensor.is_contiguous():
            problems.append(f"{name} has gaps or repeats in memory")
        elif tensor.numel():
            places.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name))
    for (_, end, name), (start, _, other) in pairwise(sorted(places)):
        if start < end:
            problems.append(f"{name} and {other} share memory")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")


def _locate(source: str | Path, kind: str) -> Path:
    """The file or folder that a name ("digits") or a path ("./digits") stands for."""
    packaged = sorted(folder.name for folder in PACKAGED.iterdir()) if PACKAGED.is_dir() else []
    if isinstance(source, str) and source in packaged:
        return PACKAGED / source / kind
    if isinstance(source, str) and source in hub.PUBLISHED:
        return hub.fetch(source)
    try:
        there = source != "" and Path(source).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        there = False
    if there:
        return Path(source)
    names = ", ".join([*packaged, *hub.PUBLISHED])
    raise CheckpointError(
        f"{str(source)[:200] or repr(source)}: no such file or folder; names are {names}"
    )


def weights_file(source: str | Path, kind: str) -> Path:
    """The file that holds the weights of a source of `kind` "vqvae" or "var" (for its hash)."""
    path = _locate(source, kind)
    return path / MODEL_FILE if path.is_dir() else path


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """What a shape cannot be is a fault of the file that it was read from."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not the shapes of a published model: {error}") from error


def load_vqvae(source: str | Path, patch_nums: Sequence[int] | None = None) -> VQVAE:
    """A VQ-VAE in eval mode on the CPU.

    source: a published .pth file, a checkpoint folder of ours, a published name
    ("vae_ch160v4096z32") or the name of one that the package carries ("digits"). patch_nums: a
    published file does not hold it; None means the 256 px schedule there, and what the folder says
    otherwise. CheckpointError where anything does not fit.
    """
    if patch_nums is not None:
        patch_nums = values.whole_numbers("patch_nums", patch_nums, 1)
    path = _locate(source, "vqvae")
    if path.is_dir():
        model = load_checkpoint(path, "vqvae")
        assert isinstance(model, VQVAE)
        if patch_nums is not None and tuple(patch_nums) != model.config.patch_nums:
            ours, theirs = tuple(patch_nums), model.config.patch_nums
            raise CheckpointError(f"{path}: patch_nums={ours}, but the checkpoint has {theirs}")
        return model
    tensors = _read_pth(path)
    with _as_checkpoint_error(path):
        config = var_adapter.vqvae_config(tensors, patch_nums, str(path))
        return build_strictly(lambda: VQVAE(config), tensors, path)


def load_var(source: str | Path, vqvae: VQVAE | None = None) -> VAR:
    """A VAR (dense, or with experts from a folder of ours) in eval mode on the CPU.

    source: as for `load_vqvae`, e.g. "var_d16". With `vqvae`, the two are checked to belong
    together. CheckpointError where anything does not fit.
    """
    path = _locate(source, "var")
    if path.is_dir():
        model = load_checkpoint(path, "var")
        assert isinstance(model, VAR)
    else:
        tensors = _read_pth(path)
        with _as_checkpoint_error(path):
            config = var_adapter.var_config(tensors, str(path))
            model = build_strictly(lambda: VAR(config), tensors, path)
    if vqvae is not None:
        with _as_checkpoint_error(path):
            check_pair(vqvae, model.config)
    return model
