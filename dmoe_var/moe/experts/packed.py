"""Copies of weights in the order in which a kernel reads them: they go with the parameter, and into
no file.

A copy is kept by the content of the weights. How often torch counts them as written to does not
tell: a fused optimiser, `.data` and inference tensors write uncounted. Within `sampling`, where
nobody writes to weights, their content is read once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from dmoe_var.sampling_time import Sampling, this_sampling

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


Place = tuple[int, int, tuple[int, ...], int]
"""Where a tensor's values lie, and how often it was seen to be written to."""


def _place(tensor: Tensor) -> Place:
    writes = 0 if tensor.is_inference() else tensor._version
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.stride(), writes


Content = tuple[tuple[torch.Size, torch.dtype, int], ...]


@dataclass(frozen=True)
class _Seen:
    """Where weights lay at a time of `sampling`."""

    places: list[Place]
    memory: list[StorageWeakRef]
    """As long as they live no other memory has the number of theirs in `places`."""


@dataclass(frozen=True)
class _Kept(Generic[Layout]):
    """A copy, what it is a copy of, and where that lay at each time of `sampling`."""

    content: Content
    packed: Packed[Layout]
    seen: WeakKeyDictionary[Sampling, _Seen] = field(default_factory=WeakKeyDictionary)


_kept = WeakTensorKeyDictionary()
"""By the first of the weights."""


def packed_of(
    weights: Sequence[Tensor],
    pack: Callable[[Sequence[Tensor]], Packed[Layout]],
    fingerprint: Callable[[Tensor], int],
) -> Packed[Layout]:
    """The packed weights; packed anew where a value has changed. `fingerprint`: of the values."""
    sampling, places = this_sampling(), [_place(weight) for weight in weights]
    kept: _Kept[Layout] | None = _kept.get(weights[0])
    if kept is not None and sampling is not None:
        seen = kept.seen.get(sampling)
        if seen is not None and seen.places == places:
            return kept.packed
    content = tuple((w.shape, w.dtype, fingerprint(w)) for w in weights)
    if kept is None or kept.content != content:
        kept = None
        forget(weights)  # its memory before the new one's
        kept = _Kept(content, pack(weights))
        _kept[weights[0]] = kept
    if sampling is not None:
        memory = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
        kept.seen[sampling] = _Seen(places, memory)
    return kept.packed


def forget(weights: Sequence[Tensor]) -> None:
    """Free the packed copy."""
    _kept.pop(weights[0], None)
