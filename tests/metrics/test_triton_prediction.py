"""Times of GPUs that are not here: loops that are counted by hand, and what the rows say."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch

from dmoe_var.config.stages import BenchmarkConfig
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


needs_disassembler = pytest.mark.skipif(
    triton.kernels() is None or disassembler() is None, reason="no triton package with nvdisasm"
)


@needs_disassembler
@pytest.mark.parametrize(("gpu", "size"), [("h100", 128), ("a100", 32)])
def test_rows(gpu, size):
    shape = Shape("d16", 1024, 4096, size, 32768)
    dense, half, none = predicted(shape, (1.0, 0.5, 0.0), torch.bfloat16, GPUS[gpu])
    tile = dense["tile"]
    # Each pass of the loop multiplies a whole tile
    flops = 2 * tile["rows"] * tile["columns"] * tile["depth"]
    assert dense["tensor_cycles"] == flops / GPUS[gpu].tensor_flops / 0.8
    assert dense["multiplied"] == 1
    assert 1 < half["multiplied"] < 2
    assert dense["zeros_ms"] == 0
    assert none["zeros_ms"] == 2 * 32768 * 4096 / GPUS[gpu].gbytes_per_s / 1e6
    # The dense products at four fifths of the peak
    peak = GPUS[gpu].multiprocessors * GPUS[gpu].gigahertz * GPUS[gpu].tensor_flops * 1e9
    assert dense["dense_ms"] == pytest.approx(4 * 32768 * 1024 * 4096 / peak / 0.8 * 1e3)
    assert none["time_ratio"] < half["time_ratio"] < dense["time_ratio"]
    assert dense["time_ratio"] > 1


@needs_disassembler
def test_few_tokens_take_as_long_as_the_weights():
    """Both products read theirs once, the path's too."""
    (row,) = predicted(Shape("d16", 1024, 4096, 128, 18), (1.0,), torch.bfloat16, GPUS["h100"])
    read = 2 * (4096 * 1024 + 18 * 1024 + 18 * 4096)
    assert row["fc1_ms"] == pytest.approx(read / 3350 / 1e6)
    assert row["dense_ms"] == pytest.approx(2 * read / 3350 / 1e6)
    assert row["time_ratio"] > 1


def test_tiles_by_hand():
    """Blocks of 512 and 18 tokens, tiles of 64 rows: the last tile holds 18 tokens."""
    mask = torch.zeros(530, 3, dtype=torch.bool)
    mask[:65, 0] = mask[512:, 1] = True
    tile = triton.Tile(512, 64, 128, 64, 3)
    assert triton_prediction._tiles(mask, tile) == (2 + 1, 128 + 18)


def test_gpus_are_those_of_the_key():
    (of_key, *_) = get_args(get_type_hints(BenchmarkConfig)["predict"])
    assert set(get_args(of_key)) == set(GPUS)


def test_what_cannot_be_predicted(monkeypatch):
    with pytest.raises(ConfigError, match=r"sampling\.dtype=float32 has no tensor instructions"):
        check_predictable("float32")
    without = [
        lambda patch: patch.setattr(triton_prediction.triton, "kernels", lambda: None),
        lambda patch: patch.setattr(triton_prediction, "disassembler", lambda: None),
        lambda patch: patch.setenv(triton.INTERPRETER, "1"),
    ]
    for missing in without:
        with monkeypatch.context() as patch:
            missing(patch)
            with pytest.raises(ConfigError, match="needs the triton package with its nvdisasm"):
                check_predictable("bfloat16")


@needs_disassembler
def test_code_that_is_not_understood(monkeypatch):
    monkeypatch.setattr(triton_prediction, "disassembled", lambda found: "NOP ;")
    shape = Shape("mini", 64, 128, 32, 10)
    with pytest.raises(ConfigError, match="whose loop is not found"):
        list(predicted(shape, (1.0,), torch.bfloat16, GPUS["a100"]))
