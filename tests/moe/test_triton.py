"""The Triton kernels without a GPU: values by the interpreter (triton_values.py), what the launcher
asks of a GPU, and the machine code that its launches are compiled to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from float64_experts import layer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_machine import SHARED_MEMORY, machine_code, no_slower_than_meant, quick_first

from dmoe_var.errors import InputError
from dmoe_var.moe import triton_router
from dmoe_var.moe.experts import PATHS, Dispatch, ExpertWeights, paths_on, run_experts, triton
from dmoe_var.moe.experts.triton_code import compiled

RELU = nn.ReLU()
needs_triton = pytest.mark.skipif(triton.kernels() is None, reason="no triton package here")
SIZES = (8, 32, 48, 64, 128, 256)
FEW, MANY = 512, triton.MANY_TOKENS
QUICK = [
    (80, torch.float16, False, 128, MANY),
    (90, torch.bfloat16, False, 128, MANY),
]
"""The tiles of the published layers; compiling takes seconds each."""
DTYPES = [(torch.float16, False), (torch.bfloat16, False), (torch.float32, False)]
LAUNCHES = [
    (arch, *dtype, size, tokens)
    for arch in SHARED_MEMORY
    for dtype in (*DTYPES, (torch.float32, True))
    for size in SIZES
    for tokens in ((FEW,) if dtype[0] == torch.float32 else (FEW, MANY))
]


@needs_triton
def test_values_by_the_interpreter():
    """Triton reads its switch when it is loaded: in a process of its own."""
    script = Path(__file__).with_name("triton_values.py")
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "--noconftest")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(script)],
        env={**os.environ, triton.INTERPRETER: "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def fake_layer(size, tokens, dtype=torch.bfloat16, width=1024):
    """x, mask and weights of a layer of four experts, on no GPU."""
    with FakeTensorMode(), torch.device("cuda"):
        weights = ExpertWeights(
            torch.empty(4, size, width, dtype=dtype), torch.empty(4, size, dtype=dtype),
            torch.empty(4, size, width, dtype=dtype), torch.empty(width, dtype=dtype),
        )  # fmt: skip
        mask = torch.empty(tokens, 4, dtype=torch.bool)
        return torch.empty(tokens, width, dtype=dtype), mask, weights


@pytest.mark.parametrize("tokens", [0, 1, 338, 100_000])
def test_the_host_does_not_wait_for_the_device(gpu, tokens):
    launches = gpu(80)
    x, mask, weights = fake_layer(32, tokens)
    out = triton.run(x, Dispatch(mask), weights, RELU)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    assert launches.keys() == ({"row_lists", "zeros", "fc1"} if tokens else set())


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_tensors_without_values_are_one_operator(impl):
    x, mask, weights = fake_layer(32, 20)
    with torch.no_grad():
        out = run_experts(x, mask, weights, RELU, impl)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)


def launches_of(gpu, arch, dtype, tf32, size, tokens):
    launches = gpu(arch)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, mask, weights = fake_layer(size, tokens, dtype)
        triton.run(x, Dispatch(mask), weights, RELU)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return launches


@needs_triton
@quick_first(QUICK, LAUNCHES)
def test_machine_code_of_fc1(gpu, launch):
    """Tensor cores unless float32 is exact, tiles that arrive meanwhile, no spilled registers."""
    from dmoe_var.moe.experts import triton_kernels

    arch, dtype, tf32, *_ = launch
    given, named = launches_of(gpu, *launch)["fc1"]
    found = compiled(triton_kernels.fc1, given, named, arch)
    code = machine_code(found)
    no_slower_than_meant(found, code, arch)
    tensor_cores = {80: "HMMA", 90: "HGMMA"}[arch]
    assert (tensor_cores in code) == (dtype != torch.float32 or tf32)
    assert "LDGSTS" in code
    if dtype != torch.float32:
        assert 2 * found.metadata.shared <= SHARED_MEMORY[arch], "two fit a multiprocessor"


@needs_triton
@pytest.mark.parametrize(
    ("arch", "tokens"),
    [
        (90, MANY),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [(80, FEW), (80, MANY), (90, FEW)]),
    ],
)
def test_machine_code_of_row_lists_and_zeros(gpu, arch, tokens):
    """Zeros are written 16 bytes at a time, by many programs per multiprocessor."""
    from dmoe_var.moe.experts import triton_kernels

    launches = launches_of(gpu, arch, torch.float16, False, 128, tokens)
    found = compiled(triton_kernels.row_lists, *launches["row_lists"], arch)
    no_slower_than_meant(found, machine_code(found), arch)
    found = compiled(triton_kernels.zeros, *launches["zeros"], arch)
    code = machine_code(found)
    no_slower_than_meant(found, code, arch)
    assert found.metadata.shared <= 2048
    named = launches["zeros"][1]
    written, threads = 2 * named["ROWS"] * named["COLUMNS"], 4 * 32
    assert code.count("STG") == written / 16 / threads


def small_layer():
    return torch.ones(5, 4), torch.ones(5, 2, dtype=torch.bool), layer(C=4, E=2, D=3)


@needs_triton
@pytest.mark.skipif(os.environ.get(triton.INTERPRETER) == "1", reason="runs on a CPU then")
@pytest.mark.parametrize("act", [RELU, nn.GELU(approximate="tanh")])
def test_a_cpu_is_refused(act):
    said = r"^impl=triton needs an NVIDIA GPU of compute capability 8.0 or more, not device=cpu$"
    with pytest.raises(InputError, match=said):
        run_experts(*small_layer(), act, "triton")


def test_without_triton_all_else_runs(monkeypatch):
    monkeypatch.setattr(triton, "kernels", lambda: None)
    with pytest.raises(InputError, match=r"^impl=triton needs the triton package, which is not"):
        run_experts(*small_layer(), RELU, "triton")
    for impl in ("auto", *paths_on(torch.device("cpu"))):
        assert run_experts(*small_layer(), RELU, impl).shape == (5, 4)
    assert list(paths_on(torch.device("cuda"))) == ["reference", "grouped"]


def test_an_old_gpu_is_refused(gpu):
    gpu(75)
    device = torch.device("cuda")
    assert triton.missing(device).endswith("compute capability 8.0 or more, not one of 7.5")
    gpu(80)
    assert list(paths_on(device)) == [name for name in PATHS if name != "native"]
    assert list(paths_on(torch.device("cpu"))) == [name for name in PATHS if name != "triton"]


@pytest.fixture
def compiler(monkeypatch):
    """A GPU that Triton compiles for or, once `compiler.missing`, does not; `compiler.asked`."""
    found = SimpleNamespace(missing=False, asked=0)

    def row_lists(*given, **named):
        found.asked += 1
        if found.missing:
            raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.delenv(triton.INTERPRETER, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *given, **named: None)
    monkeypatch.setattr(triton, "row_lists", row_lists)
    monkeypatch.setattr(triton, "_FAILURES", {})
    return found


@needs_triton
def test_a_gpu_on_which_no_kernel_starts(compiler, capfd):
    """As without a C compiler: one line says so, and `auto` does without."""
    compiler.missing, device = True, torch.device("cuda")
    for _ in range(2):
        assert list(paths_on(device)) == ["reference", "grouped"]
    reason = "RuntimeError: Failed to find C compiler."
    assert triton.missing(device) == f"impl=triton cannot run here: {reason}"
    said = f"Triton's kernels do not run here ({reason}); experts run by reference\n"
    assert capfd.readouterr().err == said
    assert compiler.asked == 1


@needs_triton
def test_kernels_are_tried_once_and_not_while_somebody_watches(compiler):
    device = torch.device("cuda")
    compiler.missing = True
    with FakeTensorMode():
        assert triton.missing(device) is None
    torch.func.vmap(lambda x: x * (triton.missing(device) is None))(torch.zeros(2))
    assert compiler.asked == 0
    compiler.missing = False
    assert [triton.missing(device) for _ in range(2)] == [None, None]
    assert compiler.asked == 1


@needs_triton
def test_routers_kernels_that_do_not_start(compiler, monkeypatch, capfd):
    """Torch's operators take their place, whichever path runs experts."""

    def fails(*given):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(triton_router, "scores", fails)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float16)
    assert [triton_router._runs_here(x) for _ in range(2)] == [False, False]
    assert triton.missing(x.device) is None
    reason = "RuntimeError: out of shared memory"
    said = f"Triton's kernels do not run here ({reason}); routers run by torch's operators\n"
    assert capfd.readouterr().err == said
