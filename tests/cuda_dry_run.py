"""CUDA without a GPU: tensors that say they are on one, and hold the values that a CPU computes.

torch's fake tensors behave as those of a GPU where there is no driver, but know no values. Here
each carries them: every operator runs on the CPU. So whole runs go through, and what they give can
be compared with the CPU's. An operator whose tensors are on two devices fails, as on a GPU, and
wherever the host would wait for the GPU is written down. Autocast is not played: torch switches it
off without a driver.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import dmoe_var

LIBRARY = os.path.join(os.path.dirname(dmoe_var.__file__), "")
CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
ON_CPU = {
    # Sums of half-precision products in float32, which the CPU does not hand out.
    torch.ops.aten.mm.dtype: lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype)),
}


class OnGPU(FakeTensor):
    """A tensor of the GPU; `value` is the CPU's. To torch's C++, which looks for a driver in the
    backward pass, it is on the meta device."""

    is_cuda = True
    is_cpu = is_meta = False

    def data_ptr(self):
        return self.value.data_ptr()  # a fake tensor's is 0, as if all shared their memory

    def tolist(self):
        return self.cpu().tolist()  # one copy, where a fake tensor gives item after item


class CudaDryRun(FakeTensorMode):
    """Within it there is a device "cuda". `waits`: how often the host waited for it, by the
    library's function that did."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return META
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, OnGPU) for x in tensors)
        named = next((x for x in leaves if isinstance(x, torch.device)), None)
        device = CPU if (named or (CUDA if on_gpu else CPU)).type == "cpu" else CUDA
        if on_gpu:
            _check_devices(func, args, tensors)
        if _waits(func, args, tensors, device):
            self.waits[_place()] += 1
        made = ON_CPU.get(func, func)(*tree_map(_value, args), **tree_map(_value, kwargs))
        given = {id(_value(x)): x for x in tensors}
        return tree_map(lambda x: given[id(x)] if id(x) in given else self._on(device, x), made)

    def _on(self, device, value):
        """A tensor on a device; whatever else an operator gives as it is."""
        if device.type != "cuda" or not isinstance(value, torch.Tensor):
            return value
        shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        fake = OnGPU(self, shape, CUDA)
        fake.value = value
        return fake


def _value(x):
    """An argument as the CPU takes it."""
    if isinstance(x, OnGPU):
        return x.value
    return CPU if isinstance(x, torch.device) else x


def _check_devices(func, args, tensors):
    """A number may come from the CPU, and so may an index; what is changed in place may not."""
    if func in COPIES:
        return
    if func in INDEXING:
        tensors = [args[0], *args[2:3]]
    changed = args[0] if func._schema.is_mutable else None
    for x in tensors:
        if not isinstance(x, OnGPU) and (x.ndim or x is changed):
            raise AssertionError(f"{func} in {_place()}: {tuple(x.shape)} was left on the CPU")


def _waits(func, args, tensors, device):
    """Whether an operator copies between the devices, or gives what only values tell."""
    on_gpu = [isinstance(x, OnGPU) for x in tensors]
    if func in COPIES:
        return len({*on_gpu, device.type == "cuda"}) > 1
    if func in INDEXING and any(on_gpu):
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor) and x.ndim]
        return any(not isinstance(x, OnGPU) or x.dtype == torch.bool for x in indices)
    return any(on_gpu) and not READS_VALUES.isdisjoint(func.tags)


def _place():
    """file:function of the library's innermost frame, which is no lambda or comprehension."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(LIBRARY) and not frame.f_code.co_name.startswith("<"):
            return f"{Path(name[len(LIBRARY) :]).as_posix()}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"
