from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from triton_machine import AnyGrid

from dmoe_var.moe import triton_router
from dmoe_var.moe.experts import triton


@pytest.fixture
def set_threads():
    """set_threads(n): torch uses n threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(arch) pretends to be on a GPU and returns the launches that fake CUDA tensors come to.

    Whatever waited for the device would raise: these tensors have no values.
    """

    def pretend(arch):
        launches = {}
        for module, names in (
            (triton, ("row_lists", "zeros", "fc1")),
            (triton_router, ("scores", "threshold")),
        ):
            fakes = SimpleNamespace(**{name: AnyGrid(launches, name) for name in names})
            monkeypatch.setattr(module, "kernels", lambda fakes=fakes: fakes)
        monkeypatch.delenv(triton.INTERPRETER, raising=False)
        monkeypatch.setattr(triton, "failure", lambda *given: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(arch, 10))
        monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
        return launches

    return pretend
