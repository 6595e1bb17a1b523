"""Keep copies of weights in the order in which a kernel reads them.

A copy lives as long as its parameter and is never saved. It is kept by the content of the weights.
torch's count of writes does not tell enough: a fused optimiser, `.data` and inference tensors write
uncounted. Within `sampling` nobody writes to weights, so their content is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from dmoe_var.sampling_time import Sampling, this_sampling


class Packed(NamedTuple):
    """Holds weights as a kernel reads them."""

    layer: Any
    """A ctypes.Structure."""
    tensors: tuple[Tensor, ...]
    """What `layer` points at."""


Place = tuple[int, int, tuple[int, ...], int]
"""Where a tensor's values lie, and torch's count of writes to it."""


def _place(tensor: Tensor) -> Place:
    writes = 0 if tensor.is_inference() else tensor._version
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.stride(), writes


Content = tuple[int, tuple[tuple[torch.Size, torch.dtype], ...]]
"""A hash of all values, and of which shapes and dtypes they are."""


class _Kept(NamedTuple):
    """Holds a copy, the content that it copies, and where that lay within each `sampling`."""

    content: Content
    packed: Packed
    seen: WeakKeyDictionary[Sampling, tuple[list[Place], list[StorageWeakRef]]]
    """While the weak references live, no other storage gets an id that is in the places."""


_kept = WeakTensorKeyDictionary()
"""A `_Kept` for each tuple of weights, by the first of them."""


def packed_of(
    weights: Sequence[Tensor],
    pack: Callable[[Sequence[Tensor]], Packed],
    fingerprint: Callable[[Sequence[Tensor]], int],
) -> Packed:
    """Return the packed weights, packed anew if a value has changed by its `fingerprint`."""
    sampling, places = this_sampling(), [_place(weight) for weight in weights]
    kept: _Kept | None = _kept.get(weights[0])
    if kept is not None and sampling is not None:
        seen = kept.seen.get(sampling)
        if seen is not None and seen[0] == places:
            return kept.packed
    content = fingerprint(weights), tuple((w.shape, w.dtype) for w in weights)
    if kept is None or kept.content != content:
        kept = _kept[weights[0]] = None  # free the old copy before the new one is made
        kept = _kept[weights[0]] = _Kept(content, pack(weights), WeakKeyDictionary())
    if sampling is not None:
        memory = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
        kept.seen[sampling] = (places, memory)
    return kept.packed


def forget(weights: Sequence[Tensor]) -> None:
    """Drop the packed copy of these weights."""
    _kept.pop(weights[0], None)
