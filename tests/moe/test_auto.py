"""The table by which the fastest path is chosen."""

from __future__ import annotations

import json

import float64_experts
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dmoe_var.moe.experts import (
    RAN,
    Dispatch,
    ExpertWeights,
    auto,
    native,
    paths_on,
    run_experts,
    triton,
)
from dmoe_var.moe.experts.paths import path
from dmoe_var.sampling_time import sampling

pytestmark = pytest.mark.skipif(native.kernel() is None, reason="no C compiler here")
RELU, CPU = nn.ReLU(), torch.device("cpu")
PATHS = paths_on(CPU)
N, C, E, D = 20, 12, 5, 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty table in an empty folder."""
    monkeypatch.setenv("DMOE_VAR_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "known", {})
    return tmp_path


@pytest.fixture
def layer():
    return float64_experts.tokens(N, C), float64_experts.layer(C, E, D)


def mask(density, tokens=N):
    return torch.rand(tokens, E, generator=torch.Generator().manual_seed(1)) < density


def fastest(x, dispatch, weights, act):
    """The path that would run."""
    found = auto.by_density(x, weights, act)
    return found if isinstance(found, str) else auto._best(dispatch.density, found)


def along(start, end, every=None):
    """Times on a line from density 0.25 to 1, and where all run."""
    line = [start + (end - start) * (density - 0.25) / 0.75 for density in auto.DENSITIES]
    return *line, end if every is None else every


def timed(monkeypatch, **seconds):
    """Measuring finds these times, `along` a line; how often it was asked."""
    asked = []
    found = {name: along(*times) for name, times in seconds.items()}
    monkeypatch.setattr(auto, "_measured", lambda *given: asked.append(given) or dict(found))
    return asked


@pytest.mark.parametrize(
    ("density", "path"), [(0.05, "native"), (0.6, "native"), (0.8, "reference"), (1, "reference")]
)
def test_the_fastest_at_the_density_of_the_mask(layer, monkeypatch, density, path):
    """native takes 1 + 4 d and reference 4: they meet at 0.75."""
    timed(monkeypatch, native=(2.0, 5.0), reference=(4.0, 4.0), grouped=(9.0, 9.0))
    before = RAN[path]
    out = run_experts(layer[0], mask(density), layer[1], RELU, "auto")
    assert RAN[path] == before + 1
    expected = run_experts(layer[0], mask(density), layer[1], RELU, "reference")
    torch.testing.assert_close(out, expected)


def test_a_path_may_know_a_shorter_way_where_all_run(layer, monkeypatch):
    """reference is slower at every mask, and faster without one."""
    timed(monkeypatch, native=(1.0, 3.0, 3.0), reference=(4.0, 4.0, 2.0), grouped=(9.0, 9.0))
    for density, name in ((0.05, "native"), (0.95, "native"), (1, "reference")):
        assert fastest(layer[0], Dispatch(mask(density)), layer[1], RELU) == name


@pytest.mark.parametrize(
    ("density", "name"), [(0.05, "native"), (0.3, "native"), (0.4, "reference"), (0.9, "reference")]
)
def test_times_follow_lines_between_three_densities(layer, monkeypatch, density, name):
    """native takes 1 at 0.15 and 3 at 0.5, and 1 / 7 at 0: it meets 2 at 0.325. Of two paths that
    are equal at both ends, the one that is slower between them is not always the best."""
    found = {"native": (1.0, 3.0, 2.0, 2.0), "reference": (2.0,) * 4, "grouped": (9.0,) * 4}
    monkeypatch.setattr(auto, "_measured", lambda *given: found)
    assert auto.by_density(layer[0], layer[1], RELU) == found
    assert auto._best(density, found) == name
    at = [auto._at(d, found["native"]) for d in (0, 0.15, 0.325, 0.5, 0.75, 1)]
    assert at == pytest.approx([1 / 7, 1, 2, 3, 2.5, 2])


@pytest.mark.parametrize("density", [0.6, 1])
def test_where_all_run_reference_multiplies_no_mask(layer, density):
    """To the bits of what it makes of a mask that it must not count."""
    counted = Dispatch(mask(density))
    assert counted.density <= density
    expected = path("reference").run(layer[0], Dispatch(mask(density)), layer[1], RELU)
    assert torch.equal(path("reference").run(layer[0], counted, layer[1], RELU), expected)
    counted.mask_NE = None if density == 1 else counted.mask_NE  # it is not looked at
    path("reference").run(layer[0], counted, layer[1], RELU)


def test_measured_once_and_kept(layer, monkeypatch, cache, set_threads):
    """For each number of threads, and 16 to 23 tokens alike."""
    asked = timed(monkeypatch, native=(1.0, 1.0), reference=(2.0, 2.0), grouped=(3.0, 3.0))
    x, weights = layer

    def times_asked(tokens=N):
        run_experts(x[:tokens], mask(0.5, tokens), weights, RELU, "auto")
        return len(asked)

    assert [times_asked(), times_asked(), times_asked(17)] == [1, 1, 1]
    monkeypatch.setattr(auto, "known", {})  # as another process would begin
    assert [times_asked(), times_asked(15)] == [1, 2]
    with sampling():
        assert times_asked() == 3
    assert len(list(cache.glob("experts-*.json"))) == 1
    threads = torch.get_num_threads()
    set_threads(threads + 1)
    assert times_asked() == 4
    set_threads(threads)
    assert times_asked() == 4
    assert len(list(cache.glob("experts-*.json"))) == 2


def test_layers_apart_are_measured_anew_and_leave_no_trace(layer, monkeypatch, cache):
    given = (layer[0], Dispatch(mask(0.5)), layer[1], RELU)
    timed(monkeypatch, native=(1.0, 1.0), reference=(2.0, 2.0), grouped=(3.0, 3.0))
    assert fastest(*given) == "native"
    (table,) = cache.glob("experts-*.json")
    before, kept = table.read_text(), auto.known.copy()
    asked = timed(monkeypatch, native=(2.0, 2.0), reference=(1.0, 1.0), grouped=(3.0, 3.0))
    with auto.apart():
        assert [fastest(*given), fastest(*given), len(asked)] == ["reference", "reference", 1]
    assert fastest(*given) == "native"
    assert (table.read_text(), auto.known) == (before, kept)
    monkeypatch.setattr(auto, "known", {})  # as another process would begin
    assert fastest(*given) == "native"


def test_a_known_case_is_looked_up_alone(layer, monkeypatch):
    timed(monkeypatch, native=(1.0, 1.0), reference=(2.0, 2.0), grouped=(3.0, 3.0))
    given = (layer[0], Dispatch(mask(0.5)), layer[1], RELU)
    assert fastest(*given) == "native"
    monkeypatch.setattr(auto, "_file", lambda device: pytest.fail("a file is looked for"))
    assert fastest(*given) == "native"
    monkeypatch.setenv(native.SWITCH, "0")
    assert fastest(*given) == "grouped"


LIST = f'{{"format": "{auto.FORMAT}", "seconds": []}}'


@pytest.mark.parametrize("content", ["", "[1]", '{"format": "other"}', "nonsense", LIST])
def test_a_broken_table_is_measured_again(layer, monkeypatch, cache, content):
    asked = timed(monkeypatch, native=(1.0, 1.0), reference=(2.0, 2.0), grouped=(3.0, 3.0))
    auto._file(CPU).write_text(content)
    run_experts(layer[0], mask(0.5), layer[1], RELU, "auto")
    assert len(asked) == 1
    assert len(json.loads(auto._file(CPU).read_text())["seconds"]) == 1


def test_the_first_who_measures_counts(layer, monkeypatch):
    """Two processes choose the same path."""
    timed(monkeypatch, native=(1.0, 1.0), reference=(2.0, 2.0))
    run_experts(layer[0], mask(0.5), layer[1], RELU, "auto")
    (key,) = json.loads(auto._file(CPU).read_text())["seconds"]
    mine = {"native": along(3.0, 3.0), "reference": along(2.0, 2.0)}
    auto._keep(auto._file(CPU), key, mine)
    assert mine == {"native": (1.0,) * 4, "reference": (2.0,) * 4}


def test_a_table_without_a_path_is_measured_again(layer, monkeypatch):
    asked = timed(monkeypatch, native=(1.0, 1.0), reference=(2.0, 2.0), grouped=(3.0, 3.0))
    run_experts(layer[0], mask(0.5), layer[1], RELU, "auto")
    content = json.loads(auto._file(CPU).read_text())
    (times,) = content["seconds"].values()
    del times["grouped"]
    auto._file(CPU).write_text(json.dumps(content))
    monkeypatch.setattr(auto, "known", {})
    run_experts(layer[0], mask(0.5), layer[1], RELU, "auto")
    assert len(asked) == 2


def test_a_table_that_cannot_be_written(layer, monkeypatch, cache, capfd):
    """A line says so, and this process remembers."""
    monkeypatch.setenv("DMOE_VAR_CACHE", str(cache / "file" / "folder"))
    (cache / "file").touch()
    asked = timed(monkeypatch, native=(1.0, 1.0), reference=(2.0, 2.0))
    for _ in range(2):
        run_experts(layer[0], mask(0.5), layer[1], RELU, "auto")
    assert len(asked) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{auto._file(CPU)}: cannot be kept (Not a directory)")


def test_every_path_is_timed_with_four_masks(layer, monkeypatch):
    """A few, half, all but one pair, all; in turn, for a while."""
    x, weights = layer
    shares = []
    monkeypatch.setattr(auto, "LONG_ENOUGH", 0.2)
    monkeypatch.setattr(auto, "_counted", lambda mask: shares.append(mask.sum()) or Dispatch(mask))
    with torch.no_grad():
        found = auto._measured(PATHS, x, weights, RELU)
    assert found.keys() == PATHS.keys()
    assert all(len(times) == 4 for times in found.values())
    assert all(0 < seconds < 10 for times in found.values() for seconds in times)
    turn = 4 * len(PATHS)
    assert len(shares) >= turn * (1 + auto.REPEATS)
    few, half, most, every = (set(map(int, shares[i::turn])) for i in range(0, turn, len(PATHS)))
    assert (most, every) == ({N * E - 1}, {N * E})
    assert 0.05 < few.pop() / (N * E) < 0.3 < half.pop() / (N * E) < 0.7


def test_without_a_folder_each_process_measures(layer, monkeypatch, capfd):
    """A process of a user without a home."""
    for name in ("DMOE_VAR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    asked = timed(monkeypatch, native=(1.0, 1.0), grouped=(2.0, 2.0), reference=(3.0, 3.0))
    for density in (0.25, 1.0):
        assert fastest(layer[0], Dispatch(mask(density)), layer[1], RELU) == "native"
    assert len(asked) == 1
    assert "cannot be kept (there is no home folder" in capfd.readouterr().err


def test_gradients_are_grouped_s(layer):
    x, weights = layer
    x.requires_grad_()
    before = RAN["grouped"]
    run_experts(x, mask(0.5), weights, RELU, "auto").sum().backward()
    assert RAN["grouped"] == before + 1
    assert x.grad is not None


def test_tokens_are_rounded_down():
    given = (1, 2, 3, 5, 6, 338, 512)
    assert [auto._rounded(tokens) for tokens in given] == [1, 2, 3, 4, 6, 256, 512]


@pytest.fixture
def gpu(monkeypatch):
    """A layer on a GPU that is none: of tensors without values nobody could tell a density."""
    monkeypatch.setattr(triton, "missing", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(auto, "_file", lambda device: auto.cache_folder() / f"{device.type}.json")
    with FakeTensorMode(), torch.device("cuda"):
        shapes = ((E, D, C), (E, D), (E, D, C), (C,))
        weights = ExpertWeights(*map(torch.empty, shapes))
        dispatch = Dispatch(torch.empty(N, E, dtype=torch.bool))
        return torch.empty(N, C), dispatch, weights, RELU


def test_on_a_gpu_the_fastest_at_one_density(gpu, monkeypatch):
    """At density 0.5 triton takes 3 and reference 3.1; grouped, which waits, is not asked."""
    asked = timed(monkeypatch, triton=(2.0, 5.0), reference=(3.1, 3.1))
    assert fastest(*gpu) == "triton"
    assert [list(paths) for paths, *_ in asked] == [["reference", "triton"]]
    assert fastest(*gpu) == "triton"
    assert len(asked) == 1


def test_nothing_is_timed_while_a_cuda_graph_is_made_or_without_kernels(gpu, monkeypatch):
    asked = timed(monkeypatch, triton=(2.0, 2.0), reference=(1.0, 1.0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest(*gpu) == "triton"
    monkeypatch.setattr(triton, "missing", lambda device: "why")
    assert fastest(*gpu) == "reference"
    assert not asked


def test_a_cuda_graph_takes_the_path_that_is_known_to_be_fastest(gpu, monkeypatch):
    timed(monkeypatch, triton=(2.0, 2.0), reference=(1.0, 1.0))
    assert fastest(*gpu) == "reference"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest(*gpu) == "reference"
