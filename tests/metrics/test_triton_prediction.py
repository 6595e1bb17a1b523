"""Times of GPUs that are not here: loops that are counted by hand, and what the rows say."""

from __future__ import annotations

import pytest
import torch

from dmoe_var.errors import ConfigError
from dmoe_var.metrics import triton_prediction
from dmoe_var.metrics.kernel_timing import Shape
from dmoe_var.metrics.triton_prediction import GPUS, check_predictable, predicted
from dmoe_var.moe.experts import triton
from dmoe_var.moe.experts.triton_code import Loop, disassembler, main_loop

LOOP = """
        /*0000*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
.L_x_1:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3) ;
"""


def test_the_main_loop_by_hand():
    """Two products of 16 x 8 x 16 by each of four warps; what is jumped to is not behind."""
    assert main_loop(LOOP, warps=4) == Loop(4, 2 * 4 * 2 * 16 * 8 * 16)
    wide = LOOP.replace("HMMA.16816", "HGMMA.64x8x16")
    assert main_loop(wide, warps=8) == Loop(4, 2 * 2 * 2 * 64 * 8 * 16)
    assert main_loop("", 4) == Loop(0, 0)


@pytest.mark.parametrize(("gpu", "size"), [("h100", 128), ("a100", 32)])
def test_rows(gpu, size):
    if triton.kernels() is None or disassembler() is None:
        pytest.skip("no triton package with a disassembler here")
    shape = Shape("d16", 1024, 4096, size, 32768)
    dense, half, none = predicted(shape, (1.0, 0.5, 0.0), torch.bfloat16, GPUS[gpu])
    tile = dense["tile"]
    # Each pass of the loop multiplies a whole tile
    flops = 2 * tile["rows"] * tile["columns"] * tile["depth"]
    assert dense["tensor_cycles"] == flops / GPUS[gpu].tensor_flops
    assert dense["multiplied"] == 1
    assert 1 < half["multiplied"] < 2
    assert dense["zeros_ms"] == none["fc1_ms"] == 0
    assert none["zeros_ms"] == 2 * 32768 * 4096 / GPUS[gpu].gbytes_per_s / 1e6
    # The dense products at four fifths of the peak
    peak = GPUS[gpu].multiprocessors * GPUS[gpu].gigahertz * GPUS[gpu].tensor_flops * 1e9
    assert dense["dense_ms"] == pytest.approx(4 * 32768 * 1024 * 4096 / peak / 0.8 * 1e3)
    assert none["time_ratio"] < half["time_ratio"] < dense["time_ratio"]


def test_what_cannot_be_predicted(monkeypatch):
    with pytest.raises(ConfigError, match=r"sampling\.dtype=float32 has no tensor instructions"):
        check_predictable("float32")
    monkeypatch.setattr(triton_prediction.triton, "kernels", lambda: None)
    with pytest.raises(ConfigError, match="needs the triton package with its nvdisasm"):
        check_predictable("bfloat16")
