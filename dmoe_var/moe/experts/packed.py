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


Content = tuple[tuple[int, torch.Size, torch.dtype], ...]
"""A hash of each tensor's values, and its shape and dtype."""
Pack = Callable[[Sequence[Tensor]], Packed]


class _Kept(NamedTuple):
    """Holds a copy, the content that it copies, and where that lay within each `sampling`."""

    content: Content
    packed: Packed
    seen: WeakKeyDictionary[Sampling, tuple[list[Place], list[StorageWeakRef]]]
    """While the weak references live, no other storage gets an id that is in the places."""


_kept = WeakTensorKeyDictionary()
"""A `_Kept` for each tuple of weights, by the first of them."""


def packed_of(
    *parts: tuple[Sequence[Tensor], Pack], fingerprints: Callable[[Sequence[Tensor]], list[int]]
) -> list[Packed]:
    """Return each part's weights as its function packs them, packed anew if a value has changed by
    the `fingerprints` of the tensors. All are read at once."""
    sampling = this_sampling()
    # Before anything is read, so that a write to what was read already is seen the next time
    places = [[_place(weight) for weight in weights] for weights, _ in parts]
    found = [
        _seen(weights[0], sampling, lie) for (weights, _), lie in zip(parts, places, strict=True)
    ]
    unread = [i for i, kept in enumerate(found) if kept is None]
    if unread:
        hashes = iter(fingerprints([weight for i in unread for weight in parts[i][0]]))
        for i in unread:
            weights, pack = parts[i]
            content = tuple((next(hashes), w.shape, w.dtype) for w in weights)
            kept = found[i] = _updated(weights, pack, content)
            if sampling is not None:
                memory = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
                kept.seen[sampling] = (places[i], memory)
    return [kept.packed for kept in found if kept is not None]


def _seen(first: Tensor, sampling: Sampling | None, places: list[Place]) -> _Kept | None:
    """Return what is kept of weights that lie at these places, if they were read within this time
    of sampling."""
    kept: _Kept | None = _kept.get(first)
    if kept is None or sampling is None:
        return None
    seen = kept.seen.get(sampling)
    return kept if seen is not None and seen[0] == places else None


def _updated(weights: Sequence[Tensor], pack: Pack, content: Content) -> _Kept:
    kept: _Kept | None = _kept.get(weights[0])
    if kept is None or kept.content != content:
        kept = _kept[weights[0]] = None  # free the old copy before the new one is made
        kept = _kept[weights[0]] = _Kept(content, pack(weights), WeakKeyDictionary())
    return kept


def forget(weights: Sequence[Tensor]) -> None:
    """Drop the packed copy of these weights."""
    _kept.pop(weights[0], None)
