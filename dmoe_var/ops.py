"""Compute matrix products and convolutions in the precision that the processor is good at.

x86 processors without bfloat16 instructions emulate its products at about a quarter of float32's
speed. There, products of bfloat16 tensors are computed in float32 from the same values and rounded
to bfloat16 once. This is faster, and at least as exact.

While sampling on an x86 CPU, float32 products of more than SMALL multiply-adds go to oneDNN, which
applies bias and activation in the same pass over the result. torch's own Linear uses MKL there,
which is slower at few rows and needs extra passes for bias and activation. Smaller products stay
with MKL, which is called faster. While sampling on an NVIDIA GPU, cuBLAS applies an FFN's bias and
activation so.

Everywhere else this is torch's own Linear and Conv2d.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from dmoe_var.sampling_time import this_sampling

ONEDNN_LINEAR = "_linear_pointwise"
_GIVES_FLOAT32 = any(
    "out_dtype" in str(schema) for schema in torch._C._jit_get_schemas_for_operator("aten::mm")
)
"""Whether this torch can return a GPU's float32 sums of half-precision products (2.8 and up)."""
PLAIN_TENSORS = (Tensor, nn.Parameter)
"""Types of tensors that are their values and nothing else."""
SMALL = 1 << 20
"""Multiply-adds. torch takes 22 microseconds longer to call oneDNN than MKL (AMD EPYC); up to so
many that is more than oneDNN gains."""
FEW_ROWS = 16
"""Up to this many rows a product only streams its weights, which bfloat16 halves."""


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def emulates_bfloat16() -> bool:
    """Say whether this machine's CPU is an x86 without instructions for products of bfloat16."""
    return _is_x86() and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


EMULATES_BFLOAT16 = emulates_bfloat16()
"""A constant, because torch.compile would trace into a cached function, and cannot trace this."""


def at_least_float32(x: Tensor) -> Tensor:
    """Turn half precisions into float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 if the device has no wider one (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _emulated(x: Tensor) -> bool:
    """Say whether torch would emulate x's product in bfloat16, its own dtype or autocast's."""
    if x.device.type != "cpu" or not EMULATES_BFLOAT16:
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.is_floating_point()
    return x.dtype == torch.bfloat16


def _rounded(x: Tensor | None) -> Tensor | None:
    """Round to bfloat16's values, in float32."""
    return x if x is None else x.bfloat16().float()


@cache
def has_onednn() -> bool:
    """Say whether this torch has oneDNN's products for this machine's CPU."""
    there = _is_x86() and torch.backends.mkldnn.is_available()
    return there and hasattr(torch.ops.mkldnn, ONEDNN_LINEAR)


def observed(x: Tensor) -> bool:
    """Say whether somebody traces, counts, casts, fakes or differentiates operators on x, and so
    must see torch's usual ones (torch.jit, torch.compile, FlopCounterMode, autocast,
    FakeTensorMode, torch.func, forward_ad)."""
    return observed_on(x.device)


def observed_on(device: torch.device) -> bool:
    """Say whether operators on a device are `observed`."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(device.type)
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def hooked(*modules: nn.Module) -> bool:
    """Say whether a hook of one of these modules is to see what goes in or comes out."""
    return any(each._forward_hooks or each._forward_pre_hooks for each in modules)


def kernels_may_take(x: Tensor, *weights: Tensor) -> bool:
    """Say whether tensors are of one dtype and device, the first weight (..., in) is as wide as x
    (..., in), no gradient is needed, and nobody has `observed` them."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    alike = all(w.dtype == x.dtype and w.device == x.device for w in weights)
    fit = all(w.shape[-1] == x.shape[-1] for w in weights[:1])
    return not learns and alike and fit and not observed(x)


def _samples(x: Tensor, weight: Tensor) -> bool:
    """Say whether a product of x may go to an operator of sampling, which has no gradients and
    knows plain weights."""
    return (
        type(weight) in PLAIN_TENSORS
        and this_sampling() is not None
        and not observed(x)
        and not torch.is_grad_enabled()
    )


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Say whether a product of x goes to oneDNN."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and _samples(x, weight)
        and x.numel() * len(weight) > SMALL
        and bool(torch.backends.mkldnn.enabled)
        and has_onednn()
    )


def _by_cublas(act: nn.Module, x: Tensor, weight: Tensor) -> bool:
    """Say whether act(x weight^T + bias) goes to cuBLAS in one piece."""
    known = isinstance(act, nn.ReLU) or (isinstance(act, nn.GELU) and act.approximate == "tanh")
    return x.is_cuda and known and _samples(x, weight) and x.numel() > 0


def _onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", form: str = ""
) -> Tensor:
    operator = getattr(torch.ops.mkldnn, ONEDNN_LINEAR)
    return operator(x, weight, bias, activation, [], form)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, ragged: bool = False) -> Tensor:
    """Compute x (..., in) weight^T (out, in) + bias (out,), (..., out), in x's or autocast's dtype.

    ragged: the number of rows differs from call to call. Then oneDNN, which has to prepare for each
    new number, is not used.
    """
    if not ragged and _by_onednn(x, weight):
        return _onednn_linear(x, weight, bias)
    if not _emulated(x) or x.numel() <= FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        out = F.linear(_rounded(x), _rounded(weight), _rounded(bias))  # type: ignore[arg-type]
        return out.bfloat16()


def unrounded_linear(x: Tensor, weight: Tensor, ragged: bool = False) -> Tensor:
    """Compute x weight^T as `linear` does, but return half precisions' sums in float32, unrounded,
    for callers who add up several."""
    if at_least_float32(x).dtype == x.dtype:
        return at_least_float32(linear(x, weight, ragged=ragged))
    weight = weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and not torch.is_grad_enabled() and _GIVES_FLOAT32:
            flat: Tensor = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
            return flat.view(*x.shape[:-1], -1)
        return F.linear(x.float(), weight.float())


class Linear(nn.Linear):
    """torch's Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def activated_linear(
    act: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, ragged: bool = False
) -> Tensor:
    """Compute act(x weight^T + bias), (..., out). Hooks of `act` are called. See `linear` for
    `ragged`."""
    if not ragged and _by_onednn(x, weight) and not hooked(act):
        if isinstance(act, nn.ReLU):
            return _onednn_linear(x, weight, bias, "relu")
        if isinstance(act, nn.GELU):
            return _onednn_linear(x, weight, bias, "gelu", act.approximate)
    if bias is not None and _by_cublas(act, x, weight) and not hooked(act):
        rows, gelu = x.flatten(0, -2), isinstance(act, nn.GELU)
        return torch._addmm_activation(bias, rows, weight.T, use_gelu=gelu).view(*x.shape[:-1], -1)
    return act(linear(x, weight, bias, ragged))


def activated(act: nn.Module, layer: nn.Linear, x: Tensor) -> Tensor:
    """Compute act(layer(x)). Hooks of both modules are called."""
    fused = _by_onednn(x, layer.weight) or _by_cublas(act, x, layer.weight)
    if not fused or hooked(layer):
        return act(layer(x))
    return activated_linear(act, x, layer.weight, layer.bias)


class Conv2d(nn.Conv2d):
    """torch's Conv2d, without emulated bfloat16; see the top of this file."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not _emulated(x_BCHW):
            return super().forward(x_BCHW)
        with torch.autocast("cpu", enabled=False):
            weight, bias = _rounded(self.weight), _rounded(self.bias)
            out: Tensor = self._conv_forward(_rounded(x_BCHW), weight, bias)  # type: ignore[arg-type]
            return out.bfloat16()


def activation(name: str) -> nn.Module:
    """Build `gelu` (the published tanh form) or `relu`."""
    return nn.ReLU() if name == "relu" else nn.GELU(approximate="tanh")
