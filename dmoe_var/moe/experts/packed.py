"""Copies of weights in the order in which a kernel reads them, kept as long as they hold the same
values: they go with the parameter, and into no file."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

Layout = TypeVar("Layout", bound=ctypes.Structure)


@dataclass(frozen=True)
class Packed(Generic[Layout]):
    """Weights as a kernel reads them."""

    layer: Layout
    tensors: tuple[Tensor, ...]
    """What `layer` points at."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class _Version:
    """The values of a tensor: its memory, which is not another's as long as this lives, and how
    often it was written to."""

    memory: StorageWeakRef
    offset: int
    stride: tuple[int, ...]
    writes: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Version:
        memory = StorageWeakRef(tensor.untyped_storage())
        return cls(memory, int(tensor.storage_offset()), tensor.stride(), tensor._version)


_packed = WeakTensorKeyDictionary()
"""(versions, `Packed`) by the first of the weights."""


def packed_of(
    weights: Sequence[Tensor], pack: Callable[[Sequence[Tensor]], Packed[Layout]]
) -> Packed[Layout]:
    """The packed weights; packed anew where a value may have changed since."""
    if any(tensor.is_inference() for tensor in weights):  # whose writes are not counted
        return pack(weights)
    versions = tuple(map(_Version.of, weights))
    kept: tuple[tuple[_Version, ...], Packed[Layout]] | None = _packed.get(weights[0])
    if kept is not None and kept[0] == versions:
        return kept[1]
    forget(weights)  # its memory before the new one's
    packed = pack(weights)
    _packed[weights[0]] = versions, packed
    return packed


def forget(weights: Sequence[Tensor]) -> None:
    """Free the packed copy."""
    _packed.pop(weights[0], None)
