"""Count the multiply-adds of one traced call, by module and operator, through fvcore.

Which operators count and which are free is stated here in full: fvcore would count norms and
resizing, and leave out attention and whatever it does not know. Unit: MAC, one multiply-add.
Legend: B batch, H heads, L queries, K keys, D head dimension.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import addmm_flop_jit, conv_flop_jit, get_shape, linear_flop_jit

Handle = Callable[[list[Any], list[Any]], int | Counter[str]]
MacsByModule = Mapping[str, Counter[str]]
"""MACs by operator of each module, those of its submodules included; "" is the whole call."""


class UnknownOperatorError(RuntimeError):
    """An operator ran, and this module does not know whether it costs anything."""


def matmul_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Count any product over the first operand's last dimension, broadcast or not."""
    return math.prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


def einsum_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Count an einsum of two operands with named dimensions: the product of all distinct ones."""
    terms = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    shapes = [get_shape(value) for value in inputs[1].node().inputs()]
    if len(terms) != 2 or "." in "".join(terms):
        raise UnknownOperatorError(f"aten::einsum of {','.join(terms)}: two plain operands count")
    sides: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, side in zip(term, shape, strict=True):
            sides[letter] = max(side, sides.get(letter, 1))
    return math.prod(sides.values())


def attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Count attention of q (B, H, L, D), k (B, H, K, D), v: the products q k and (softmax) v."""
    q, k, v = (get_shape(value) for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


COUNTED: Mapping[str, Handle] = {
    "aten::linear": linear_flop_jit,
    "aten::addmm": addmm_flop_jit,
    "aten::matmul": matmul_macs,
    "aten::mm": matmul_macs,
    "aten::bmm": matmul_macs,
    "aten::einsum": einsum_macs,
    "aten::_convolution": conv_flop_jit,
    "aten::scaled_dot_product_attention": attention_macs,
}
"""Operators that count."""

FREE = (
    # one or a few operations per element
    "add", "add_", "index_add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "abs",
    "exp", "pow",
    "addcmul", "square", "sqrt", "rsqrt", "clamp_min", "clamp_max", "gelu", "silu", "silu_",
    "sigmoid", "tanh",
    # reductions and norms
    "sum", "mean", "amax", "softmax", "norm", "linalg_vector_norm", "layer_norm", "group_norm",
    # resizing
    "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bicubic2d",
    # moving, looking up, drawing
    "alias", "clone", "lift_fresh", "numpy_T", "expand_as", "view_as", "unflatten", "repeat",
    "pad", "embedding", "index_select", "ones_like", "bernoulli_", "topk", "sort", "scatter",
)  # fmt: skip
"""Operators (of the namespace aten) that count as nothing. fvcore ignores some more on its own
(jit_analysis._IGNORED_OPS): shapes, indices, copies, comparisons, clamps and ReLU, no product."""


def count_macs(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    modules: Mapping[str, nn.Module],
) -> MacsByModule:
    """Count the MACs of `call(*inputs)`, which runs once, without gradients.

    `modules`: the modules that the call uses, under the names that the result is to have. What is
    not returned by `call` may go uncounted. Raise UnknownOperatorError for an operator that is
    in neither COUNTED nor FREE.
    """
    handles: dict[str, Handle | None] = {
        **COUNTED,
        **dict.fromkeys(f"aten::{name}" for name in FREE),
    }
    analysis = FlopCountAnalysis(_Call(call, modules), inputs).clear_op_handles()
    analysis.set_op_handle(**handles)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        macs: MacsByModule = analysis.by_module_and_operator()
    unknown = analysis.unsupported_ops()
    if unknown:
        operator = min(unknown)
        users = [name for name in macs if analysis.unsupported_ops(name)[operator]]
        innermost = max(users, key=lambda name: name.count(".") + bool(name))
        where = innermost.removeprefix("modules_used.") or "the traced call itself"
        raise UnknownOperatorError(
            f"{operator} in {where} is neither counted nor known to be free: add it to COUNTED or "
            "FREE in dmoe_var/metrics/flops_ops.py"
        )
    prefix = "modules_used."
    return {name.removeprefix(prefix): counts for name, counts in macs.items()}


class _Call(nn.Module):
    """A function as the module that fvcore traces."""

    def __init__(
        self, call: Callable[..., Tensor | tuple[Tensor, ...]], modules: Mapping[str, nn.Module]
    ):
        super().__init__()
        self.call = call
        self.modules_used = nn.ModuleDict(modules)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(*inputs)
