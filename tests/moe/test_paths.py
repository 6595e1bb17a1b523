"""Paths by name: each is loaded when it is used, and says itself what it can run."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from float64_experts import layer, tokens
from pydantic import TypeAdapter
from torch import nn

from dmoe_var.config.root import MoEConfig
from dmoe_var.moe.experts import RAN, auto, paths, run_experts

CPU, RELU = torch.device("cpu"), nn.ReLU()


def small_layer():
    draws = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    return tokens(5, 4), draws < 0.5, layer(C=4, E=3, D=2)


@pytest.fixture
def added(monkeypatch, tmp_path):
    """added(name=value): there is a path "added", whose file defines these."""

    def add(**defined):
        module = ModuleType("dmoe_var.moe.experts.added")
        vars(module).update(defined, __file__=__file__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(paths, "_loaded", {})
        monkeypatch.setattr(paths, "PATHS", (*paths.PATHS, "added"))
        monkeypatch.setattr("dmoe_var.moe.experts.IMPLEMENTATIONS", ("auto", *paths.PATHS))
        monkeypatch.setenv("DMOE_VAR_CACHE", str(tmp_path))
        monkeypatch.setattr(auto, "known", {})

    return add


@pytest.mark.parametrize("name", paths.IMPLEMENTATIONS)
def test_every_name_is_a_file(name):
    found, module = paths.path(name), import_module(f"dmoe_var.moe.experts.{name}")
    assert found.run is module.run
    assert TypeAdapter(MoEConfig).validate_python({"impl": name}).impl == name
    assert paths.path(name) is found


def test_the_table_belongs_to_a_paths_file(added, tmp_path):
    """Unless it says itself what its speed depends on."""
    added(run=lambda *given: None)
    assert paths.path("added").version() == Path(__file__).read_text("utf-8")
    added(run=lambda *given: None, version=lambda: "2")
    assert paths.path("added").version() == "2"
    before = auto._file(CPU)
    added(run=lambda *given: None, version=lambda: "3")
    assert auto._file(CPU) != before


def test_a_path_of_run_alone(added):
    """It is given the mask's dispatch, and is a path of every device."""
    given = []
    added(run=lambda *args: given.append(args) or "out")
    x, mask, weights = small_layer()
    before = RAN["added"]
    assert run_experts(x, mask, weights, RELU, "added") == "out"
    ((*_, act),) = given
    assert (given[0][0] is x, given[0][1].mask_NE is mask, act) == (True, True, RELU)
    assert RAN["added"] == before + 1
    assert "added" in paths.paths_on(CPU)
    assert "added" in paths.paths_on(torch.device("mps"))


def test_limits(added):
    """What a path cannot run is run by grouped; where it is not there it is not tried."""
    added(run=None, can_run=lambda x, weights, act: len(x) > 5, runs_on=lambda device: False)
    x, mask, weights = small_layer()
    out = run_experts(x, mask, weights, RELU, "added")
    assert torch.equal(out, run_experts(x, mask, weights, RELU, "grouped"))
    assert "added" not in paths.paths_on(CPU)


@pytest.mark.parametrize("known", [True, False])
def test_auto_tries_it(added, monkeypatch, known):
    """Beside all that can run the same, also where no other kernel does: this is no ReLU."""
    added(run=lambda *args: "out", can_run=lambda *args: known)
    timed = []
    monkeypatch.setattr(
        auto, "_measured", lambda of, *_: timed.extend(of) or dict.fromkeys(of, (1,) * 4) | fast
    )
    fast = {"added": (0.5,) * 4}
    x, mask, weights = small_layer()
    out = run_experts(x, mask, weights, nn.GELU(), "auto")
    assert (timed == ["reference", "grouped", "added"]) == known
    assert (out == "out") if known else torch.is_tensor(out)


@pytest.mark.parametrize("impl", ["reference", "grouped", "native"])
def test_a_file_that_cannot_be_loaded_breaks_no_other(monkeypatch, impl):
    monkeypatch.setattr(paths, "_loaded", {})
    for name in paths.IMPLEMENTATIONS:
        if name not in (impl, paths.FALLBACK):
            monkeypatch.setitem(sys.modules, f"dmoe_var.moe.experts.{name}", None)
    run_experts(*small_layer(), RELU, impl)
    with pytest.raises(ImportError):
        run_experts(*small_layer(), RELU, "triton")
