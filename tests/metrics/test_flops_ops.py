"""FLOPs of operators: equal to PyTorch's own counter; what is not known raises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmoe_var.metrics.flops import count_flops
from dmoe_var.metrics.flops_ops import UnknownOperatorError, count_macs

OPERATORS = {
    "linear": (nn.functional.linear, [(2, 3, 6), (7, 6), (7,)]),
    "addmm": (torch.addmm, [(3, 7), (3, 6), (6, 7)]),
    "mm": (torch.mm, [(3, 6), (6, 7)]),
    "bmm": (torch.bmm, [(2, 3, 6), (2, 6, 7)]),
    "matmul": (torch.matmul, [(2, 3, 6), (6, 7)]),
    "matmul, broadcast": (torch.matmul, [(3, 6), (5, 6, 7)]),
    "einsum": (lambda x, y: torch.einsum("b i j, b j k -> b i k", x, y), [(2, 3, 6), (2, 6, 7)]),
    "convolution": (
        lambda x, w: nn.functional.conv2d(x, w, stride=2, padding=1, groups=2),
        [(1, 4, 6, 7), (6, 2, 3, 3)],
    ),
    "attention": (
        nn.functional.scaled_dot_product_attention,
        [(2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 7)],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_cost_what_pytorch_counts(name):
    operator, shapes = OPERATORS[name]
    operands = tuple(torch.ones(shape) for shape in shapes)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        operator(*operands)
    macs = count_macs(operator, operands, {})[""].total()
    assert macs > 0
    assert 2 * macs == counter.get_total_flops()


class Erf(nn.Module):
    def forward(self, x):
        return torch.erf(x)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.mT @ x

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class Hidden(nn.Module):
    def forward(self, x):
        return OwnFunction.apply(x)


@pytest.mark.parametrize(
    ("module", "operator"), [(Erf(), "aten::erf"), (Hidden(), "prim::PythonOp.OwnFunction")]
)
def test_an_operator_on_neither_list_raises(make_var, make_vqvae, module, operator):
    var = make_var()
    var.blocks[1].ffn.act = module
    with pytest.raises(UnknownOperatorError) as error:
        count_flops(var, make_vqvae(), [0])
    assert f"{operator} in backbone.blocks.1.ffn.act " in str(error.value)


def test_an_einsum_of_three_operands_raises():
    with pytest.raises(UnknownOperatorError, match="einsum of ij,jk,kl"):
        count_macs(lambda x: torch.einsum("ij,jk,kl->il", x, x, x), (torch.ones(3, 3),), {})


def test_products_that_no_part_has_raise(make_var, make_vqvae):
    """A cost outside attention, FFN and head must not drop out of the total."""
    var = make_var()
    block, weight_CC = var.blocks[0], torch.eye(var.config.width)
    norm = block._norm
    block._norm = lambda x_BLC: norm(x_BLC) @ weight_CC
    with pytest.raises(RuntimeError, match="neither attention, FFN nor head"):
        count_flops(var, make_vqvae(), [0])


def test_what_fvcore_ignores_by_itself_is_no_product():
    from fvcore.nn.jit_analysis import _IGNORED_OPS

    products = ("mm", "matmul", "dot", "linear", "conv", "einsum", "attention", "mv", "cdist")
    assert not [op for op in _IGNORED_OPS if any(name in op for name in products)]
