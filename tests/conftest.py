"""Tiny models whose weights all matter, and the outputs of the published code (parity data)."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dmoe_var import (
    VAR,
    VQVAE,
    VARConfig,
    VQVAEConfig,
    convert_to_moe,
    generators,
    load_var,
    load_vqvae,
    ops,
)
from dmoe_var.sampling import token_sampling

pytest_plugins = ["tiny_experiment"]

if "PYTEST_XDIST_WORKER" in os.environ:  # these share the cores, as what they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# What is compiled and measured for this machine is kept from one run of the tests to the next.
os.environ.setdefault("DMOE_VAR_CACHE", str(Path(__file__).parents[1] / ".pytest_cache/dmoe_var"))

FORMULA = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "parity" / "formula.py")))

CHECKOUT = Path(__file__).resolve().parents[1]


def _of_checkout():
    """Files of the checkout but for what tools keep there: hidden folders, bytecode, metadata."""
    found = set()
    for folder, inner, names in os.walk(CHECKOUT):
        inner[:] = [
            n for n in inner if n[0] != "." and n != "__pycache__" and n[-9:] != ".egg-info"
        ]
        found |= {os.path.relpath(os.path.join(folder, name), CHECKOUT) for name in names}
    return found


@pytest.fixture(scope="session", autouse=True)
def no_strays():
    """No test writes into the checkout: what is new there at the end fails the last one."""
    before = _of_checkout()
    yield
    assert sorted(_of_checkout() - before) == []


@pytest.fixture(params=["mkl", "onednn", "both"])
def libraries(request, monkeypatch):
    """Sampling's products go to this library, where there is oneDNN: those of tiny models to both
    by their size."""
    small = {"mkl": 1 << 30, "onednn": 0, "both": 1 << 14}
    monkeypatch.setattr(ops, "SMALL", small[request.param])


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
def cuda_dry_run():
    """with cuda_dry_run() as run: there is a device "cuda", the same each time (see
    cuda_dry_run.py); run.waits tells where the host waited for it."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = runpy.run_path(str(Path(__file__).parent / "cuda_dry_run.py"))["CudaDryRun"]()

    @contextmanager
    def dry_run():
        run.waits.clear()
        of_cpu = partial(generators.seeded, "cpu")
        with pytest.MonkeyPatch.context() as patch, run:
            patch.setattr(generators, "seeded", lambda device, seed: of_cpu(seed))
            yield run

    return dry_run


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


@pytest.fixture(scope="session", params=["separate", "shared", "tiny", "tiny_shared_aln"])
def parity(request, tmp_path_factory):
    """One pair of models of the published code: files, configuration, inputs, outputs, and ours.

    The first two lie in tests/parity. The others, larger and with torch's own draws, lie in
    ../shared/parity, where there is one (or where DMOE_VAR_SHARED says).
    """
    name = request.param
    here, beside = Path(__file__).parent / "parity", Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("DMOE_VAR_SHARED", beside)) / "parity"
    if (here / f"{name}.json").is_file():
        folder, draws = here, swapped_draws
    elif folder.is_dir():
        draws = nullcontext
    else:
        pytest.skip(f"no parity data at {folder}; DMOE_VAR_SHARED names the folder that holds them")
    config = json.loads((folder / f"{name}.json").read_text())
    io = load_file(folder / f"{name}{'' if folder == here else '_io'}.safetensors")
    if folder == here:
        folder = tmp_path_factory.mktemp(name)
        write_published(folder, name, config, io)
    vae_path, var_path = folder / f"{name}_vae.pth", folder / f"{name}_var.pth"
    vqvae = load_vqvae(vae_path, config["patch_nums"])
    step = config.get("pixel_step", 1)
    return SimpleNamespace(
        vae_path=vae_path,
        var_path=var_path,
        config=config,
        io=io,
        vqvae=vqvae,
        var=load_var(var_path, vqvae),
        draws=draws,
        pixels=lambda images: images[..., ::step, ::step],
    )


def write_published(folder, name, config, io):
    """The state dicts as the published code saves them, and the inputs, of tests/parity."""
    states = {"vae": {}, "var": {}}
    for key, shape in config["shapes"].items():
        part, tensor_name = key.split(".", 1)
        states[part][tensor_name] = io[key] if key in io else FORMULA.weight(tensor_name, shape)
    for part, state in states.items():
        torch.save(state, folder / f"{name}_{part}.pth")
    io["label"] = torch.tensor(config["labels"])
    io["image"] = FORMULA.images(len(io["label"]), config["resolution"])


@contextmanager
def swapped_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "exponential_", FORMULA.exponential_)
        patch.setattr(token_sampling, "_inverts_uniform", lambda: False)
        yield
