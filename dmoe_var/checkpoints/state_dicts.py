"""Find the one state dict that is meant in a file: bare, or within a trainer's checkpoint.

The published trainer saves both models beside its optimiser. Others wrap theirs as "model" or
"state_dict". DistributedDataParallel, torch.compile and FSDP put a word into every name. What a
state dict is follows from its own names, whatever the file calls it.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe_var.checkpoints.safetensors_io import READ_BY
from dmoe_var.errors import CheckpointError

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Words that torch's wrappers put into names."""
LANDMARKS = {
    "vqvae": ("quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.weight"),
    "var": ("pos_start", "pos_1LC", "lvl_1L", "word_embed.weight"),
}
"""Names in state dicts of that kind, and in none of the other kind."""
TITLES = {"vqvae": "VQ-VAE", "var": "VAR"}
DEEPEST = 4
"""Levels of nested dictionaries to look into."""


def read_pth(path: Path, kind: str) -> dict[str, Tensor]:
    """Read the state dict of `kind` "vqvae" or "var" from a file of torch: tensors, never code. It
    is memory-mapped, so that loading holds the weights once. Compressed files and those in torch's
    format before 1.6 are read into memory."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # a trainer's options
            content = torch.load(
                str(path), map_location="cpu", weights_only=True, mmap=_can_be_mapped(path)
            )
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        held = f"{code[1]}, which may be code" if code else "something else than plain tensors"
        raise CheckpointError(
            f"{path}: refused, holds {held}, or no state dict at all; save the weights alone: "
            "torch.save(model.state_dict(), file)"
        ) from error
    except Exception as error:  # a broken file makes the readers raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path}: cut short or no state dict ({reason})") from error
    return _plain(meant(content, kind, path), path)


def meant(content: object, kind: str, path: Path) -> dict[str, Tensor]:
    """Find the one state dict of a kind in what a file holds, without the words of wrappers.

    Raise CheckpointError, which says what there is, if there is none or more than one.
    """
    found: dict[str, dict[str, Any]] = {}
    others: set[str] = set()
    for place, candidate in _mappings(content, set()):
        names = _unwrapped(candidate, path)
        if any(n.startswith("dense.") for n in names) and any(n.startswith("moe.") for n in names):
            raise CheckpointError(
                f"{path}: both models of a DynamicVAR: {READ_BY['dynamic_var']} take its folder"
            )
        for other in LANDMARKS:
            for prefix, state in _of_kind(names, other):
                if other == kind:
                    found[f"{place}{prefix}".rstrip(".")] = state
                else:
                    others.add(other)
    if not found:
        raise CheckpointError(f"{path}: {_without(content, kind, others)}")
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: several state dicts of a {TITLES[kind]}: {', '.join(found)}; save "
            "the one that you mean in a file of its own"
        )
    (state,) = found.values()
    wrong = [f"{n} is {type(t).__name__}" for n, t in state.items() if not isinstance(t, Tensor)]
    if wrong:
        raise CheckpointError(f"{path}: not a state dict of tensors ({', '.join(wrong)[:80]})")
    return state


def _mappings(
    content: object, seen: set[int], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every dictionary with names in a file's content once, with its place ("trainer.var.").
    seen: the ids of those before."""
    if not isinstance(content, Mapping) or id(content) in seen or depth > DEEPEST:
        return
    seen.add(id(content))
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    yield place, named
    for key, value in named.items():
        yield from _mappings(value, seen, f"{place}{key}.", depth + 1)


def _unwrapped(names: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Drop the words of torch's wrappers from names; raise CheckpointError if two become one."""
    plain: dict[str, Any] = {}
    for name, value in names.items():
        short = ".".join(word for word in name.split(".") if word not in WRAPPERS)
        if short in plain and isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {short} is there twice, wrapped and not")
        plain[short] = value
    return plain


def _of_kind(names: Mapping[str, Any], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield state dicts of a kind in one dictionary: itself, or the parts of a larger module."""
    prefixes = {
        name.removesuffix(landmark): None
        for landmark in LANDMARKS[kind]
        for name, value in names.items()
        if isinstance(value, Tensor) and (name == landmark or name.endswith(f".{landmark}"))
    }
    for prefix in prefixes:
        own = {n.removeprefix(prefix): t for n, t in names.items() if n.startswith(prefix)}
        yield prefix, own


def _without(content: object, kind: str, others: set[str]) -> str:
    """Say what a file is that has no state dict of the kind."""
    wanted = f"a {TITLES[kind]}"
    for other in others:
        return f"holds a {TITLES[other]}, not {wanted}: {READ_BY[other]} take it"
    found = type(content).__name__
    if isinstance(content, Mapping):
        found = ", ".join(map(str, content))[:120] or "nothing"
    return f"not a state dict of {wanted} (found {found})"


def _plain(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Bring tensors into the usual order of memory (channels-last weights are in another). Raise
    CheckpointError for one that is sparse, quantised or without values, or that repeats its
    numbers: a file of a few kilobytes could claim to hold any size. Raise it also for two over the
    same memory: training one would change the other."""
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.is_meta
        or tensor.nbytes > tensor.untyped_storage().nbytes()
    ]
    if odd:
        raise CheckpointError(f"{path}: no plain numbers in {', '.join(odd)}")
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    places = sorted((t.data_ptr(), t.nbytes, name) for name, t in plain.items() if t.nbytes)
    for (start, size, name), (next_start, _, other) in pairwise(places):
        if next_start < start + size:
            raise CheckpointError(f"{path}: {name} and {other} share memory")
    return plain


def _can_be_mapped(path: Path) -> bool:
    """Tell whether a file is an uncompressed zip archive: torch would map packed bytes as well."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
