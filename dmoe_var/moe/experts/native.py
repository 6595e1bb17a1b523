"""Run ReLU experts, their router and its threshold on a CPU by compiled code, see native.c.

fc1 reads each expert's tokens where they lie, and fc2 adds its outputs where they belong, so time
follows the number of (token, expert) pairs. Weights that no cache holds are asked for while those
before them are multiplied. fc2 skips hidden values that ReLU made 0, except where the processor
multiplies bfloat16 in pairs. In bfloat16, products and sums are float32; hidden activations and the
sum of all experts are rounded once each, as a dense FFN's are. A token's bits depend neither on the
number of threads nor on the other tokens.

Weights are packed once, see packed.py: those in bfloat16 as float32, in twice the memory, where the
processor does not multiply them in pairs. Experts that fill no register, or no tile of pairs, are
packed beside each other, and a token that runs one of them computes its neighbours too. `can_run`
says what the kernel knows. DMOE_VAR_NATIVE=0 switches it off. `python -m
dmoe_var.moe.experts.native` compiles it beforehand, for example while a machine image is built.

Legend: N tokens, C width, E experts, D neurons per expert, p columns per panel, P panels.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_var import c_library
from dmoe_var.moe.experts.dispatch import Dispatch
from dmoe_var.moe.experts.packed import Packed, packed_of
from dmoe_var.moe.experts.weights import ExpertWeights
from dmoe_var.ops import PLAIN_TENSORS, hooked, kernels_may_take

SOURCE = Path(__file__).with_suffix(".c")
DTYPES = (torch.float32, torch.bfloat16)
SWITCH = "DMOE_VAR_NATIVE"
CACHED = 1 << 20
"""Bytes of a layer's weights up to which memory is not asked for them early."""
WIDEST = 8192
"""Most inputs, hidden neurons and experts of a router."""
_memory = threading.local()
"""Each thread's workspace, kept for its next call: fresh memory takes longer than a product."""


class _Layer(ctypes.Structure):
    """Mirrors `Layer` in native.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "experts", "size", "members")),
        *((name, ctypes.c_int64) for name in ("vectors", "half", "pairs", "finite", "streamed")),
        *((name, ctypes.c_void_p) for name in ("w1", "w2", "b1", "b2")),
    )


class _Router(ctypes.Structure):
    """Mirrors `Router` in native.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "hidden", "experts")),
        *((name, ctypes.c_int64) for name in ("vectors1", "vectors2", "half", "dots")),
        *((name, ctypes.c_void_p) for name in ("w1", "w2")),
    )


class _Kernel:
    """Declares the functions of native.c."""

    def __init__(self, library: ctypes.CDLL):
        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = getattr(library, f"dmoe_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        number, real, memory = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
        layer, router = ctypes.POINTER(_Layer), ctypes.POINTER(_Router)
        self.experts = function(
            "experts", None, layer, memory, memory, memory, number, number, memory
        )
        self.workspace = function("workspace", number, layer, number, number)
        self.scores = function("scores", None, router, memory, memory, number, number)
        self.threshold = function(
            "threshold", number, memory, memory, number, number, number, real, number
        )
        self.layer = function(
            "layer", number, router, layer, memory, memory, number, number, real, number, memory
        )
        self.select = function(
            "select", number, router, memory, memory, number, number, real, number, memory
        )
        self.zero = function("zero", None, memory, memory, number, number, number, number, number)
        self._large_pages = function("large_pages", None, memory, number)
        self._fingerprints = function("fingerprints", None, *(memory,) * 3, number, number)
        self.pairs: int = function("pairs", number)()
        """How bfloat16 is multiplied: 0 widened, 1 in pairs by AVX-512, 2 in pairs by AMX."""
        self.dots = bool(function("dots", number)())
        """Whether routers' tokens in bfloat16 are multiplied in pairs by AVX-512."""
        self.tile: int = function("tile", number)()
        """Rows, columns and depth of a tile of pairs."""
        self.lanes: int = function("lanes", number)()
        """float32 values per register."""
        self.vectors: int = function("vectors", number)()
        """Registers per panel of fc2, and at most as many per panel of fc1."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate memory, on large pages if the system has them: the kernels stream through it."""
        made = torch.empty(shape, dtype=dtype, device="cpu")
        self._large_pages(made.data_ptr(), made.nbytes)
        return made

    def packed(self, kind: Any, numbers: Sequence[int], views: Iterable[Tensor]) -> Packed:
        """Copy tensors, and make a structure of numbers and pointers to the copies."""
        tensors = tuple(self.empty(x.shape, x.dtype).copy_(x) for x in views)
        return Packed(kind(*numbers, *(tensor.data_ptr() for tensor in tensors)), tensors)

    def fingerprints(self, tensors: Sequence[Tensor]) -> list[int]:
        """Hash the values of each tensor in their order, to 64 bits."""
        tensors = [tensor.contiguous() for tensor in tensors]
        count = len(tensors)
        places = (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors))
        sizes = (ctypes.c_int64 * count)(*(tensor.nbytes for tensor in tensors))
        hashes = (ctypes.c_uint64 * count)()
        self._fingerprints(places, sizes, hashes, count, torch.get_num_threads())
        return list(hashes)


@cache
def _compiled() -> _Kernel | None:
    purpose = "impl=native is not to be had and experts run by torch's operators"
    return c_library.loaded(SOURCE, _Kernel, purpose)


def kernel() -> _Kernel | None:
    """Return the kernel; None if it is switched off or, as a line on stderr says, not compiled."""
    return None if os.environ.get(SWITCH) == "0" else _compiled()


def version() -> str:
    """Return the source that is compiled, and how it is packed for and called."""
    return SOURCE.read_text("utf-8") + Path(__file__).read_text("utf-8")


def runs_on(device: torch.device) -> bool:
    """See `paths.ComputePath`."""
    return device.type == "cpu"


def can_run(x_NC: Tensor, weights: ExpertWeights, act: nn.Module) -> bool:
    """Say whether these are ReLU experts that the kernel `knows`, with no hook on the ReLU."""
    return isinstance(act, nn.ReLU) and knows(x_NC, *weights) and not hooked(act)


def run(x_NC: Tensor, dispatch: Dispatch, weights: ExpertWeights, act: nn.Module) -> Tensor:
    """See `paths.ComputePath`; native.c lists each expert's tokens itself."""
    loaded = _compiled()
    assert loaded is not None
    x_NC, mask_NE = x_NC.contiguous(), dispatch.mask_NE.contiguous()
    out_NC = torch.empty_like(x_NC)
    (packed,) = packed_of((weights, pack), fingerprints=loaded.fingerprints)
    threads = torch.get_num_threads()
    loaded.experts(
        packed.layer, x_NC.data_ptr(), mask_NE.data_ptr(), out_NC.data_ptr(), len(x_NC), threads,
        _workspace(loaded, packed.layer, len(x_NC), threads).data_ptr(),
    )  # fmt: skip
    return out_NC


class Layer:
    """A layer that the kernel `knows`, prepared once, as long as nobody writes to its weights.

    In both calls the first `selecting` tokens choose by Eq. 3 on the router's scores, and each
    further as many run what those do. They give None if a score is not finite.
    """

    def __init__(self, router: Sequence[Tensor], weights: ExpertWeights):
        """router: fc1 (R, C) and fc2 (E, R)."""
        loaded = _compiled()
        assert loaded is not None
        self._kernel, self._num_experts = loaded, len(router[1])
        self._router, self._experts = packed_of(
            (router, _pack_router), (weights, pack), fingerprints=loaded.fingerprints
        )

    def run(self, x_NC: Tensor, selecting: int, tau: float) -> Tensor | None:
        """Compute the layer's output, (N, C)."""
        x_NC, tokens, threads = x_NC.contiguous(), len(x_NC), torch.get_num_threads()
        out_NC = torch.empty_like(x_NC)
        bad = self._kernel.layer(
            self._router.layer, self._experts.layer, x_NC.data_ptr(), out_NC.data_ptr(), tokens,
            selecting, tau, threads, self._memory(tokens, threads),
        )  # fmt: skip
        return None if bad else out_NC

    def select(self, x_NC: Tensor, selecting: int, tau: float) -> Dispatch | None:
        """Choose the experts, and do not run them."""
        x_NC, tokens, threads = x_NC.contiguous(), len(x_NC), torch.get_num_threads()
        mask_NE = x_NC.new_empty((tokens, self._num_experts), dtype=torch.bool)
        pairs = self._kernel.select(
            self._router.layer, x_NC.data_ptr(), mask_NE.data_ptr(), tokens, selecting, tau,
            threads, self._memory(tokens, threads),
        )  # fmt: skip
        return None if pairs < 0 else Dispatch(mask_NE, pairs)

    def _memory(self, tokens: int, threads: int) -> int:
        return _workspace(self._kernel, self._experts.layer, tokens, threads).data_ptr()


def _workspace(loaded: _Kernel, layer: _Layer, tokens: int, threads: int) -> Tensor:
    """Return this thread's workspace; grow it if it is too small."""
    size = loaded.workspace(layer, tokens, threads)
    if getattr(_memory, "bytes", None) is None or len(_memory.bytes) < size:
        _memory.bytes = None  # free the old one first
        _memory.bytes = loaded.empty((size,), torch.uint8)
    return _memory.bytes


def zeroed(h_NED: Tensor, mask_NE: Tensor) -> Tensor:
    """Write 0 where an expert does not run, into hidden values that the kernel `knows`. What is not
    contiguous is copied."""
    loaded = _compiled()
    assert loaded is not None
    h_NED, mask_NE = h_NED.contiguous(), mask_NE.contiguous()
    given = (*h_NED.shape, h_NED.element_size(), torch.get_num_threads())
    loaded.zero(h_NED.data_ptr(), mask_NE.data_ptr(), *given)
    return h_NED


def knows(x: Tensor, *weights: Tensor) -> bool:
    """Say whether the kernel is there and takes these tensors: plain ones on a CPU, all float32 or
    all bfloat16, x as wide as the first weight, without gradients, and with nobody watching
    operators."""
    plain = all(type(each) in PLAIN_TENSORS for each in (x, *weights))
    given = plain and x.is_cpu and x.dtype in DTYPES and kernels_may_take(x, *weights)
    return given and kernel() is not None


def knows_router(x: Tensor, fc1_RC: Tensor, fc2_ER: Tensor, *others: Tensor) -> bool:
    """Say whether the kernel `knows` these, those of a router fit each other, and a few tokens'
    values fit on its stack."""
    fit = fc2_ER.shape[1] == len(fc1_RC) and max(*fc1_RC.shape, len(fc2_ER)) <= WIDEST
    return fit and knows(x, fc1_RC, fc2_ER, *others)


def knows_layer(
    x: Tensor, router: Sequence[Tensor], weights: ExpertWeights, act: nn.Module
) -> bool:
    """Say whether the kernel `knows_router` and `can_run` the experts."""
    fit = weights.w1_EDC.shape[-1] == x.shape[-1] and isinstance(act, nn.ReLU) and not hooked(act)
    return fit and knows_router(x, *router, *weights)


def scores(x: Tensor, fc1_RC: Tensor, fc2_ER: Tensor) -> Tensor:
    """Compute |fc2 GELU(fc1 x)|, (..., E), for tokens x (..., C): the kernel `knows_router`."""
    loaded = _compiled()
    assert loaded is not None
    x = x.contiguous()
    *others, width = x.shape
    found = x.new_empty((*others, fc2_ER.shape[0]))
    weights = (fc1_RC, fc2_ER)
    (packed,) = packed_of((weights, _pack_router), fingerprints=loaded.fingerprints)
    num_tokens, threads = x.numel() // width, torch.get_num_threads()
    loaded.scores(packed.layer, x.data_ptr(), found.data_ptr(), num_tokens, threads)
    return found


def threshold(scores: Tensor, tau: float) -> Tensor | None:
    """Apply Eq. 3 to scores (..., E) that the kernel `knows`; None if a score is not finite."""
    loaded = _compiled()
    assert loaded is not None
    scores = scores.contiguous()
    mask = torch.empty_like(scores, dtype=torch.bool)
    experts, half = scores.shape[-1], int(scores.dtype == torch.bfloat16)
    tokens, given = scores.numel() // experts, (scores.data_ptr(), mask.data_ptr())
    bad = loaded.threshold(*given, tokens, experts, half, tau, torch.get_num_threads())
    return None if bad else mask


@torch.no_grad()
def _pack_router(weights: Sequence[Tensor]) -> Packed:
    loaded = kernel()
    assert loaded is not None
    fc1_RC, fc2_ER = weights
    vectors = [_vectors(loaded, len(weight)) for weight in weights]
    half = weights[0].dtype == torch.bfloat16
    (R, C), E = fc1_RC.shape, len(fc2_ER)
    dots = half and loaded.dots and C % loaded.tile == 0 and R % loaded.tile == 0
    views = [
        _in_panels(weight.float().T, count * loaded.lanes).transpose(0, 1)
        for weight, count in zip(weights, vectors, strict=True)
    ]
    if dots:
        views[0] = _in_pairs(_in_panels(fc1_RC.T, loaded.tile).transpose(0, 1), loaded.tile)
    return loaded.packed(_Router, (C, R, E, *vectors, int(half), int(dots)), views)


@torch.no_grad()
def pack(weights: Sequence[Tensor]) -> Packed:
    """Pack experts in the layout that native.c reads."""
    loaded = kernel()
    assert loaded is not None
    *of_experts, b2_C = weights
    lanes, half = loaded.lanes, b2_C.dtype == torch.bfloat16
    vectors = loaded.vectors
    pairs = loaded.pairs if half else 0
    # Small experts as one, unless 0 times a weight of those that do not run would not be 0
    finite = bool(of_experts[-1].isfinite().all())
    experts, size, _ = of_experts[-1].shape
    members = _members(experts, size, loaded.tile if pairs else lanes) if finite else 1
    w1_EDC, b1_ED, w2_EDC = (x.unflatten(0, (-1, members)).flatten(1, 2) for x in of_experts)
    E, D, C = w1_EDC.shape
    if pairs:
        widest = columns = loaded.tile
        w1 = _in_pairs(_in_panels(w1_EDC.mT, columns).transpose(1, 2), loaded.tile)
        w2 = _in_pairs(_in_panels(w2_EDC, columns).permute(2, 0, 1, 3), loaded.tile)
    else:
        widest, vectors = vectors * lanes, _vectors(loaded, D)
        columns = vectors * lanes
        w1 = _in_panels(w1_EDC.float().mT, columns).transpose(1, 2)
        w2 = _in_panels(w2_EDC.float(), widest).permute(2, 0, 1, 3)
    b1, b2 = _in_panels(b1_ED, columns).float(), _in_panels(b2_C, widest).float()
    streamed = int(w1.nbytes + w2.nbytes > CACHED)
    numbers = (C, E, D, members, vectors, int(half), pairs, int(finite), streamed)
    return loaded.packed(_Layer, numbers, (w1, w2, b1, b2))


def _members(experts: int, size: int, columns: int) -> int:
    """Return how many experts of a size are packed as one: the most that fit into the columns of a
    register or tile, and divide their number."""
    most = max(1, columns // size)
    return max(number for number in range(1, most + 1) if experts % number == 0)


def _vectors(loaded: _Kernel, columns: int) -> int:
    """Return the registers per panel: 1 if panels of `loaded.vectors` would need more padding."""
    wide = loaded.vectors
    return 1 if -(-columns // loaded.lanes) % wide else wide


def _in_panels(x: Tensor, columns: int) -> Tensor:
    """Cut (..., all columns) into panels (..., P, p), padded with zeros."""
    return F.pad(x, (0, -x.shape[-1] % columns)).unflatten(-1, (-1, columns))


def _in_pairs(x: Tensor, tile: int) -> Tensor:
    """Turn (..., depth, p) into (..., depth / 2, p, 2), with the depth padded to whole tiles."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % tile)).unflatten(-2, (-1, 2)).mT


if __name__ == "__main__":
    print(c_library.load(SOURCE)._name)
