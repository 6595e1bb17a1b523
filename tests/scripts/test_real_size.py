"""Every stage on VAR-d16's real size, from files of the published layout, on ImageNet pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from dmoe_var import DynamicVAR, build_models

PICTURES = Path(__file__).resolve().parents[3] / "shared/data/imagenet-one-per-class-288.tar"
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MOST_MEMORY = 16 * 2**30
BATCHES = ("steps=2", "epochs=null", "batch_size=2", "micro_batch_size=1")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PICTURES.exists(), reason="no ImageNet pictures in ../shared/data"),
]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Command-line options: random weights as the published code saves them, 1,000 pictures."""
    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(PICTURES) as archive:
        archive.extractall(folder / "images", filter="data")
    torch.manual_seed(0)
    for name, model in zip(("vae_ch160v4096z32", "var_d16"), build_models(16), strict=True):
        torch.save(model.state_dict(), folder / f"{name}.pth")
    return [
        "experiment=imagenet_d16", f"run_dir={folder / 'runs'}", "device=cpu", "dtype=float32",
        f"base.vqvae={folder / 'vae_ch160v4096z32.pth'}", f"base.var={folder / 'var_d16.pth'}",
        f"data.root={folder / 'images'}", "data.train=val", "data.limit=4", "data.held_out=2",
        "data.workers=0", "data.encode_batch=2", "conversion.train=ffn", "conversion.scales=last3",
        "sparsify.activation_checkpointing=true",
        *(f"{stage}.{key}" for stage in ("sparsify", "train_router") for key in BATCHES),
    ]  # fmt: skip


def run_script(script, *arguments, log):
    """Run a script; its exit status, what it printed, and its peak memory in bytes."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments, "progress=false"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=log.parent, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(), usage.ru_maxrss * 1024


def test_three_commands_and_what_comes_after(options, tmp_path):
    """Within 16 GB; the exported model is at most 1.46 times the dense one."""
    fidelity = ("fidelity.backbone=efflite0", "fidelity.precision_recall=false")
    for script, *extra in (
        ("sparsify",),
        ("split",),
        ("train_router",),
        ("export",),
        ("evaluate", "evaluate.num_samples=2", "sampling.batch_size=1", *fidelity),
        ("sample", "classes=[golden_retriever,985]", "seeds=[3]", "tau=0.2"),
    ):
        status, text, peak = run_script(script, *options, *extra, log=tmp_path / f"{script}.log")
        assert status == 0, f"{script}: {text[-2000:]}"
        assert peak < MOST_MEMORY, script
    runs = Path(options[1].partition("=")[2]) / "imagenet_d16"
    records = {p.parts[-3]: json.loads(p.read_text()) for p in runs.rglob("result.json")}
    assert set(records["sparsify"]["weights"]) == {"base.vqvae", "base.var", "data"}
    assert records["split"]["metrics"]["num_experts"] == 32
    macs = records["evaluate"]["metrics"]
    assert macs["flops_qkv_proj_gmac"] == pytest.approx(91.27, abs=0.01)
    assert macs["flops_decoder_gmac"] == pytest.approx(196.86, abs=0.01)
    sizes = records["export"]["metrics"]
    assert sizes["dense_parameters_m"] == pytest.approx(310.28, abs=0.01)
    assert sizes["parameters_m"] <= 1.46 * sizes["dense_parameters_m"]
    (folder,) = runs.glob("export/*/dynamic_var")
    stored = (folder / "model.safetensors").stat().st_size
    assert stored <= 1.46 * (runs.parents[1] / "var_d16.pth").stat().st_size
    assert DynamicVAR.from_pretrained(folder).moe_scales == (7, 8, 9)
    (grid,) = runs.glob("sample/*/grid.png")
    assert grid.stat().st_size > 10_000
