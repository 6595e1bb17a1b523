"""Build models around given tensors, strictly: every key, shape and constant has to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dmoe_var.errors import CheckpointError

Model = TypeVar("Model", bound=nn.Module)
WEIGHT_TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_fit(wanted: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Raise CheckpointError if a state dict does not fit a module; one line names what does not."""
    wants = wanted.state_dict()
    pairs = [(name, tensors[name], wants[name]) for name in sorted(wants.keys() & tensors.keys())]
    found = {
        "missing {} keys: ": sorted(wants.keys() - tensors.keys()),
        "unexpected {} keys: ": sorted(tensors.keys() - wants.keys()),
        "{} wrong shapes: ": [
            f"{name} is {tuple(given.shape)}, should be {tuple(want.shape)}"
            for name, given, want in pairs
            if given.shape != want.shape
        ],
        "{} wrong types: ": [
            f"{name} is {given.dtype} ({given.layout})"
            for name, given, want in pairs
            if not _same_kind(want, given)
        ],
    }
    problems = [kind.format(len(of)) + ", ".join(of) for kind, of in found.items() if of]
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")


def check_constants(skeleton: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Raise CheckpointError if a buffer that follows from the shape (scale numbers, the mask)
    differs, or if weights are not of WEIGHT_TYPES."""
    for name, buffer in skeleton.named_buffers():
        given = tensors[name]
        if buffer.is_meta or given.is_meta:  # no values to compare
            continue
        if not torch.equal(buffer.to(given), given):
            raise CheckpointError(f"{source}: {name} is not what follows from the shape")
    dtypes = {tensors[name].dtype for name, _ in skeleton.named_parameters()}
    if not dtypes <= WEIGHT_TYPES:
        found, allowed = (", ".join(sorted(map(str, types))) for types in (dtypes, WEIGHT_TYPES))
        raise CheckpointError(f"{source}: weights are {found}; allowed: {allowed}")


def _same_kind(a: Tensor, b: Tensor) -> bool:
    """Say whether layouts agree, and both are of floating point or of the same other dtype."""
    if a.layout != b.layout:
        return False
    return b.is_floating_point() if a.is_floating_point() else a.dtype == b.dtype


class _WithoutInitialValues(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device there is nothing to fill, and the first normal_ would
    import torch's compiler (160 MB)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_strictly(
    build: Callable[[], Model], tensors: Mapping[str, Tensor], source: Path | str
) -> Model:
    """Build a module on the meta device and give it these very tensors, uncopied, in eval mode.

    Weights of mixed precisions are promoted to one that loses nothing. Raises CheckpointError if
    the tensors do not fit.
    """
    try:
        with torch.device("meta"), _WithoutInitialValues():
            model = build()
    except (ValueError, ArithmeticError, RuntimeError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{source}: no model has its shape: {_first_line(error)}") from error
    check_fit(model, tensors, source)
    check_constants(model, tensors, source)
    model.load_state_dict(tensors, assign=True)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return (model.to(reduce(torch.promote_types, dtypes)) if len(dtypes) > 1 else model).eval()
