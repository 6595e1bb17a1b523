"""Runs scripts as a user does, on settings that take a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STAGES = ("train_vqvae", "train_var", "sparsify", "train_router")
LENGTH = ("steps=6", "batch_size=8", "log_every=1", "validate_every=4", "checkpoint_every=2")
TINY = [
    "data.image_size=8", "vqvae.num_res_blocks=1", "vqvae.z_channels=8", "vqvae.vocab_size=32",
    "vqvae.patch_nums=[1,2,3,4]", "var.depth=1", "var.width=32", "var.num_heads=1",
    "moe.scales=[1,2,3]", "base.vqvae=null", "base.var=null", "threads=1", "device=cpu",
    "progress=false", *(f"{stage}.{key}" for stage in STAGES for key in LENGTH),
]  # fmt: skip


class Finished(NamedTuple):
    status: int
    """Exit status, or minus the signal that ended it."""
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def start_server():
    """The process that starts scripts (start_server.py)."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("start_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with server:
        yield server
        server.stdin.close()


@pytest.fixture(scope="session")
def launch(start_server, tmp_path_factory):
    """launch(script, *arguments, cwd=, kill=, env=) -> Finished, in a process of its own.

    kill=(function, n): SIGKILL before its n-th call of the function of that dotted name; a third
    item is another signal. env: variables beside the server's own.
    """
    folder = tmp_path_factory.mktemp("streams")

    def launch(script, *arguments, cwd, kill=None, env=None):
        streams = {name: str(folder / name) for name in ("stdout", "stderr")}
        argv = [str(SCRIPTS / f"{script}.py"), *arguments]
        request = {"argv": argv, "cwd": str(cwd), "kill": kill, "env": env, **streams}
        start_server.stdin.write(json.dumps(request) + "\n")
        start_server.stdin.flush()
        status = int(start_server.stdout.readline())
        return Finished(status, *(Path(name).read_text() for name in streams.values()))

    return launch


@pytest.fixture(scope="session")
def tiny():
    """Command-line options that make the digits experiment tiny."""
    return TINY


@pytest.fixture(scope="session")
def undisturbed(launch, tiny, tmp_path_factory):
    """A folder in which the pipeline ran up to the routers, and was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert launch("pipeline", "until=train_router", *tiny, cwd=folder).status == 0
    return folder
