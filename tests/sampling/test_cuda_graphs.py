"""CUDA graphs on a tape: operators are written down with their memory, and run again on it.

The models are in float64, where sampling uses torch's own operators, which a tape can see.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmoe_var import (
    VAR,
    All,
    CollaborativeVAR,
    CudaGraphs,
    HeadSkipping,
    Random,
    Threshold,
    TokenSkipping,
    generate,
)
from dmoe_var.errors import ConfigError, InputError
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.selection import finite
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.sampling import sampler
from dmoe_var.sampling.draw import Drawing
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.sampling_time import this_sampling

FIRST, OTHER = [0, 3, 5], [1, 1, 4]
GIVEN = {"impl": "reference", "top_k": 20, "top_p": 0.9}
OFF = (1.5, 1.5, 1.5, 0.0)
KEPT = TokenSkipping((0.0, 0.0, 0.4, 0.5), "distance", first_layer=1)


class Tape(TorchDispatchMode):
    """Plays torch.cuda.CUDAGraph. What an operator gives goes where it gave it when recorded."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            torch.Tag.data_dependent_output in func.tags
            or torch.Tag.dynamic_output_shape in func.tags
        ):
            raise AssertionError(f"{func}: the host waits, which no graph can hold")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            owned = [each.alias_info is None for each in func._schema.returns]
            if all(owned):
                for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(value)

    def pool(self):
        return self


def checked_at_the_end(scores):
    """As on a GPU."""
    this_sampling().check_at_end(scores.isfinite().all(), finite.NOT_FINITE)
    return scores


@pytest.fixture(autouse=True)
def tapes(monkeypatch):
    """A machine with graphs: those made, in order."""
    made = []

    @contextmanager
    def recording(graph, pool=None, stream=None, **_):
        made.append(graph)
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    for name in ("device", "stream", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(finite, "_checked", checked_at_the_end)
    monkeypatch.setattr(sampler, "config_device", lambda model: SimpleNamespace(type="cuda"))
    check = sampler.check_labels
    monkeypatch.setattr(sampler, "check_labels", lambda *a: check(*a[:2], torch.device("cpu")))
    return made


@pytest.fixture(scope="module")
def models(tiny_models):
    return [copy.deepcopy(model).double() for model in tiny_models]


def drawn(models, labels, graphs=None, **options):
    """Images, and the experts that ran."""
    counts = ExpertCounts()
    images = generate(*models, labels, observer=counts, graphs=graphs, **GIVEN | options)
    return images, [counts.per_token(si) for si in counts.scales]


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.5},
        {"tau": 0.5, "cfg": OFF},
        {"tau": 0.5, "share_mask": True, "cfg": OFF},
        {"tau": 0.5, "skipping": KEPT},
        {"tau": 0.5, "adaln_every_scale": True},
    ],
    ids=str,
)
def test_images_and_experts_are_those_without(models, options, monkeypatch, tapes):
    graphs, steps = CudaGraphs(), []
    step = VAR.step
    monkeypatch.setattr(VAR, "step", lambda *a, **k: steps.append(None) or step(*a, **k))
    calls = [(labels, seed) for seed in (0, 1) for labels in (FIRST, OTHER)]
    plain = [drawn(models, labels, seed=seed, **options) for labels, seed in calls]
    steps.clear()
    found = []
    for labels, seed in calls:
        found.append(drawn(models, labels, graphs, seed=seed, **options))
    assert len(steps) == 8  # of the first and of the second call
    assert len(tapes) == 4
    for (images, ran), (expected, expected_ran) in zip(found, plain, strict=True):
        assert torch.equal(images, expected)
        assert all(map(torch.equal, ran, expected_ran))
    assert not torch.equal(found[2][0], found[3][0])


def test_what_makes_another_recording(models, tapes):
    """Another number of images, tau, path or guidance; whoever observes; weights elsewhere."""
    graphs = CudaGraphs()
    models = copy.deepcopy(models)

    def again(labels=FIRST, **options):
        for _ in range(3):
            generate(*models, labels, graphs=graphs, **GIVEN | {"tau": 0.5} | options)
        return len(tapes)

    assert again() == 4
    assert again(seed=7, start_index=3) == 4
    assert again(top_k=5, top_p=0.5, cfg=4.0) == 4  # what is drawn, not what is computed
    assert again([1, 2]) == 8
    assert again(tau=0.6) == 12
    assert again(cfg=OFF) == 16
    assert again(observer=ExpertCounts()) == 20
    weight = models[0].moe.blocks[0].ffn.w1_EDC
    weight.data = weight.data.clone()
    assert again() == 24


def test_weights_that_are_written_into_count(models, tapes):
    models = copy.deepcopy(models)
    graphs = CudaGraphs()
    for _ in range(3):
        before = drawn(models, FIRST, graphs, tau=0.5)[0]
    with torch.no_grad():
        models[0].dense.head.weight.mul_(-1)
    after = drawn(models, FIRST, graphs, tau=0.5)[0]
    assert torch.equal(after, drawn(models, FIRST, tau=0.5)[0])
    assert not torch.equal(after, before)
    with torch.no_grad():
        models[0].moe.blocks[0].ffn.router.fc1.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        drawn(models, FIRST, graphs, tau=0.5)
    assert len(tapes) == 4


def test_a_recording_that_fails_is_made_anew(models, monkeypatch, tapes):
    graphs = CudaGraphs()
    expected = drawn(models, FIRST, tau=0.5)[0]
    drawn(models, FIRST, graphs, tau=0.5)
    step, calls = VAR.step, []

    def failing(*args, **named):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return step(*args, **named)

    monkeypatch.setattr(VAR, "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        drawn(models, FIRST, graphs, tau=0.5)
    for _ in range(2):
        assert torch.equal(drawn(models, FIRST, graphs, tau=0.5)[0], expected)
    assert len(calls) == 3 + 4


def test_an_image_that_stops_between_scales_does_no_harm(models, monkeypatch, tapes):
    graphs = CudaGraphs()
    expected = drawn(models, FIRST, tau=0.5)[0]
    drawn(models, OTHER, graphs, tau=0.5)
    draw, calls = sampler._draw_codes, []

    def stopped(*args):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(sampler, "_draw_codes", stopped)
    with pytest.raises(KeyboardInterrupt):
        drawn(models, OTHER, graphs, tau=0.5)
    for _ in range(2):
        assert torch.equal(drawn(models, FIRST, graphs, tau=0.5)[0], expected)
    assert len(tapes) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"selection": Random(1)},
        {"heads": HeadSkipping((0.0, 0.0, 0.0, 0.5))},
        {"tau": 0.5, "impl": "grouped"},
    ],
    ids=["chance", "heads", "a path that waits"],
)
def test_what_they_cannot_hold_runs_without(models, options, tapes):
    graphs, expected = CudaGraphs(), drawn(models, FIRST, **options)[0]
    for _ in range(3):
        assert torch.equal(drawn(models, FIRST, graphs, **options)[0], expected)
    assert not tapes


def test_every_expert(models, tapes):
    graphs, expected = CudaGraphs(), drawn(models, FIRST, selection=All())[0]
    for _ in range(3):
        assert torch.equal(drawn(models, FIRST, graphs, selection=All())[0], expected)
    assert len(tapes) == 4


def test_under_inference_mode_and_after_it(models, tapes):
    graphs, expected = CudaGraphs(), drawn(models, FIRST, tau=0.5)[0]
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(drawn(models, FIRST, graphs, tau=0.5)[0], expected)
    assert torch.equal(drawn(models, FIRST, graphs, tau=0.5)[0], expected)
    assert len(tapes) == 4


def test_a_drafter_and_means(models, make_var, tapes):
    dynamic, vqvae = copy.deepcopy(models)
    E, C = dynamic.moe.config.num_experts, dynamic.config.C
    generator = torch.Generator().manual_seed(5)
    means = {si: torch.randn(2, E, C, generator=generator).double() for si in (2, 3)}
    dynamic.set_skipped(SkippedMeans(means))
    drafted = CollaborativeVAR(make_var(seed=3).double(), dynamic, 2)
    for model in (dynamic, drafted):
        graphs, expected = CudaGraphs(), drawn((model, vqvae), OTHER, tau=0.5)
        for labels in (FIRST, FIRST, OTHER):
            images, ran = drawn((model, vqvae), labels, graphs, tau=0.5)
        assert torch.equal(images, expected[0])
        assert all(map(torch.equal, ran, expected[1]))


def test_two_calls_at_once_are_refused(models, monkeypatch):
    graphs = CudaGraphs()
    for _ in range(2):
        drawn(models, FIRST, graphs, tau=0.5)
    draw = sampler._draw_codes

    def interrupted(*args):
        monkeypatch.setattr(sampler, "_draw_codes", draw)
        drawn(models, OTHER, graphs, tau=0.5)
        return draw(*args)

    monkeypatch.setattr(sampler, "_draw_codes", interrupted)
    with pytest.raises(RuntimeError, match="another call of generate used these graphs"):
        drawn(models, FIRST, graphs, tau=0.5)


def test_a_first_call_that_fails_does_not_count(models, monkeypatch, tapes):
    graphs, step = CudaGraphs(), VAR.step
    monkeypatch.setattr(VAR, "step", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn(models, FIRST, graphs, tau=0.5)
    monkeypatch.setattr(VAR, "step", step)
    drawn(models, FIRST, graphs, tau=0.5)
    assert not tapes


def test_a_drawing_of_several_batches(models, monkeypatch, tapes):
    """Not of few, for which recording costs more than it saves; the counts of experts are kept."""
    labels = np.arange(8) % 5
    how = {"batch_size": 2, "top_k": 20, "cuda_graphs": True}
    monkeypatch.setattr("dmoe_var.sampling.draw.config_device", lambda model: torch.device("cuda"))
    for given, count in ((labels, 4), (labels[:6], 0)):
        tapes.clear()
        found = [
            Drawing(*models, given, 0, SamplingConfig(**how | more), Threshold(0.5), "reference")
            for more in ({}, {"cuda_graphs": False})
        ]
        for number in range(found[0].num_batches):
            with_graphs, without = (drawing.batch(number) for drawing in found)
            assert np.array_equal(with_graphs.samples.images, without.samples.images)
            assert np.array_equal(with_graphs.ran.times_NSK, without.ran.times_NSK)
        assert len(tapes) == count


def test_what_is_no_graphs(models):
    with pytest.raises(ValueError, match="graphs=True must be CudaGraphs or None"):
        generate(*models, FIRST, graphs=True)
    with pytest.raises(
        ConfigError, match=r"sampling.cuda_graphs=true: needs .*=cpu; allowed: false"
    ):
        SamplingConfig(cuda_graphs=True).new_graphs(torch.device("cpu"))


def test_without_a_gpu(models, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="graphs need an NVIDIA GPU, but the model is on cpu"):
        generate(*models, FIRST, tau=Threshold(0.5).tau, graphs=CudaGraphs())
