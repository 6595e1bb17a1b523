"""What loading costs: the weights are held once, in pages of the file; and what that must not mean:
a loaded model is independent of its file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checking import same

from dmoe_var import VAR, VARConfig, load_var
from dmoe_var.checkpoints.safetensors_io import MODEL_FILE, save_checkpoint

ALLOWED = 1.15
"""Peak of resident memory over the bytes of the weights, once every weight has been read."""

PROBE = """
import json, os, sys
import torch
import dmoe_var

torch.set_num_threads(1)


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


# A fresh process each: a peak never falls.
for path in sys.argv[1:]:
    if os.fork() == 0:
        before, modules = peak(), set(sys.modules)
        var = dmoe_var.load_var(path)
        total = sum(float(tensor.double().sum() if tensor.numel() < 1e6 else tensor.sum())
                    for tensor in var.parameters())
        tensors = [*var.parameters(), *var.buffers()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        imported = {name.split(".")[0] if name.startswith("sympy") else name
                    for name in set(sys.modules) - modules
                    if name in ("sympy", "torch._dynamo", "torch._inductor")}
        print(json.dumps({"path": path, "peak": peak() - before, "bytes": size, "sum": total,
                          "imported": sorted(imported)}), flush=True)
        os._exit(0)
    os.wait()
"""

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"
)


def measured(*paths):
    """What a process that loads each of these and reads every weight took, in order."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE, *map(str, paths)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def write_both(folder, **fields):
    """A VAR as a .pth file and as a folder of ours; every weight is 2**-10."""
    path = folder / "var.pth"
    with torch.device("meta"), patch.object(VAR, "_init_weights"):
        skeleton = VAR(VARConfig(**fields))
    weights = {name for name, _ in skeleton.named_parameters()}
    levels = torch.cat([torch.full((p * p,), i) for i, p in enumerate(skeleton.config.patch_nums)])
    mask = torch.where(levels[:, None] >= levels, 0.0, -torch.inf)
    kept = {"lvl_1L": levels[None], "attn_bias_for_masking": mask[None, None]}
    state = {
        name: torch.full(tensor.shape, 2**-10)
        if name in weights
        else kept.get(name, torch.zeros(tensor.shape))
        for name, tensor in skeleton.state_dict().items()
    }
    torch.save(state, path)
    del state
    save_checkpoint(folder / "var", load_var(path))
    return path, folder / "var"


@pytest.fixture(scope="module")
def loading(tmp_path_factory, make_var):
    """Measurements of a 260 MB file and folder (published width, 3 layers), and of tiny ones."""
    folder = tmp_path_factory.mktemp("memory")
    path, ours = write_both(folder, depth=3, width=1024, num_heads=16)
    save_checkpoint(folder / "shared", make_var(shared_adaln=True))
    found = measured(path, ours, folder / "shared")
    for file in (path, ours / MODEL_FILE):
        file.unlink()
    return found


@needs_proc
def test_weights_are_held_once(loading):
    for found in loading[:2]:
        assert found["bytes"] > 250e6
        assert found["sum"] == pytest.approx(found["bytes"] / 4 * 2**-10, rel=0.02)
        assert found["peak"] / found["bytes"] <= ALLOWED, found
        # Below 1 the weights would not have been read, or not been counted.
        assert found["peak"] / found["bytes"] > 0.95, found


@needs_proc
def test_loading_imports_no_compiler(loading):
    """torch's compiler and sympy take seconds and up to 160 MB, and loading needs neither."""
    assert [found["imported"] for found in loading] == [[], [], []]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_d16_weights_are_held_once(tmp_path, shared_adaln):
    for found in measured(*write_both(tmp_path, depth=16, shared_adaln=shared_adaln)):
        assert found["bytes"] > 800e6
        assert found["peak"] / found["bytes"] <= 1.06, found


# Independent of the file


@pytest.fixture(params=["zip", "legacy", "folder"])
def stored(request, make_var, tmp_path):
    """(source to load, the file that holds the weights)."""
    var, path = make_var(), tmp_path / "var.pth"
    if request.param == "folder":
        save_checkpoint(tmp_path / "var", var)
        return tmp_path / "var", tmp_path / "var" / MODEL_FILE
    torch.save(var.state_dict(), path, _use_new_zipfile_serialization=request.param == "zip")
    return path, path


def test_training_steps_on_a_loaded_model(stored, make_var, make_teacher):
    """The same losses and weights as from a model in plain memory. The file stays, and so does
    another model loaded from it."""
    source, file = stored
    before = file.read_bytes()
    mapped, other, plain, fresh = load_var(source), load_var(source), make_var(), make_var()
    labels, teacher = torch.tensor([0, 3]), make_teacher(plain)
    losses = {}
    for name, var in (("mapped", mapped), ("plain", plain)):
        optimizer = torch.optim.AdamW(var.parameters(), lr=1e-2)
        losses[name] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = var(labels, teacher).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["mapped"] == losses["plain"]
    assert losses["mapped"][-1] < losses["mapped"][0]
    assert same(mapped, plain)
    assert same(other, fresh)
    assert file.read_bytes() == before


def test_a_model_outlives_its_file(stored, make_var):
    source, file = stored
    var = load_var(source)
    file.unlink()
    assert same(var, make_var())


def test_a_model_outlives_a_save_over_it(make_var, tmp_path):
    save_checkpoint(tmp_path / "var", make_var())
    var = load_var(tmp_path / "var")
    save_checkpoint(tmp_path / "var", make_var(seed=1))
    assert same(var, make_var())
    with torch.no_grad():
        var.head.weight.zero_()
    save_checkpoint(tmp_path / "var", var)
    assert load_var(tmp_path / "var").head.weight.abs().max() == 0
