"""Tiny models whose weights all matter, and the outputs of the published code (parity data)."""

from __future__ import annotations

import json
import multiprocessing
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dmoe_var import VAR, VQVAE, VARConfig, VQVAEConfig, convert_to_moe, load_var, load_vqvae

if "PYTEST_XDIST_WORKER" in os.environ:  # these share the cores, as what they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

TINY = {"patch_nums": (1, 2, 3, 4), "vocab_size": 32, "z_channels": 8}
TINY_VQVAE = {**TINY, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1}
TINY_VAR = {**TINY, "depth": 2, "width": 64, "num_heads": 2, "num_classes": 5}


@torch.no_grad()
def randomised(model, seed):
    """Gives every weight a size that shows in the output: a fresh VAR's gates are nearly 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else 16
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model.eval()


@pytest.fixture(scope="session")
def make_vqvae():
    """(**fields of VQVAEConfig) -> a tiny VQVAE of 8 px images with random weights."""
    return lambda seed=0, **fields: randomised(VQVAE(VQVAEConfig(**TINY_VQVAE | fields)), seed)


@pytest.fixture(scope="session")
def make_var():
    """(**fields of VARConfig) -> a tiny VAR with random weights."""
    return lambda seed=0, **fields: randomised(VAR(VARConfig(**TINY_VAR | fields)), seed)


@pytest.fixture(scope="session")
def make_moe():
    """(var, expert_size) -> its expert version, neurons dealt to the experts at random."""

    def make(var, expert_size=32):
        num_experts = var.config.hidden // expert_size
        generator = torch.Generator().manual_seed(0)
        labels = [
            torch.arange(num_experts).repeat(expert_size)[
                torch.randperm(var.config.hidden, generator=generator)
            ]
            for _ in var.blocks
        ]
        return convert_to_moe(var, expert_size, labels=labels)

    return make


@pytest.fixture(scope="session")
def make_teacher():
    """(var, batch) -> random teacher input (B, L - 1, Cvae) in the model's dtype."""

    def make(var, batch=2, seed=0):
        config, generator = var.config, torch.Generator().manual_seed(seed)
        length = config.num_tokens - config.patch_nums[0] ** 2
        teacher = torch.randn(batch, length, config.z_channels, generator=generator)
        return teacher.to(next(var.parameters()).dtype)

    return make


@pytest.fixture(scope="session")
def head_inputs():
    """with head_inputs(*vars) as xs: all that enters their heads, in order, before any rounding."""

    @contextmanager
    def record(*models):
        seen = []
        hooks = [
            model.head_nm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for model in models
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    return record


@pytest.fixture(scope="session")
def full_disk():
    """with full_disk(size): a file cannot grow beyond `size` bytes, as where a disk is full."""
    resource = pytest.importorskip("resource", reason="file sizes cannot be limited here")

    @contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def warm_processes(monkeypatch):
    """New processes are forked from one that has imported torch and the library: 5 s less each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmoe_var.stages.benchmark"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def parity_dir():
    """The folder of the published code's outputs; see its README.md."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("DMOE_VAR_SHARED", beside)) / "parity"
    if not folder.is_dir():
        pytest.skip(f"no parity data at {folder}; DMOE_VAR_SHARED names the folder that holds them")
    return folder


@pytest.fixture(scope="session", params=["tiny", "tiny_shared_aln"])
def parity(request, parity_dir):
    """One parity model: its files, configuration, inputs and outputs, and our loaded versions."""
    name = request.param
    config = json.loads((parity_dir / f"{name}.json").read_text())
    vae_path, var_path = parity_dir / f"{name}_vae.pth", parity_dir / f"{name}_var.pth"
    vqvae = load_vqvae(vae_path, config["patch_nums"])
    return SimpleNamespace(
        vae_path=vae_path,
        var_path=var_path,
        config=config,
        io=load_file(parity_dir / f"{name}_io.safetensors"),
        vqvae=vqvae,
        var=load_var(var_path, vqvae),
    )
