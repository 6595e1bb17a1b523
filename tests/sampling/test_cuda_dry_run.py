"""Sampling on a GPU that is not there: the CPU's images, and where the host waits for the GPU.

Within a scale it must not: a scale is hundreds of short operators, which the GPU is to have before
it is done with those of the scale before.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dmoe_var import (
    Cumulative,
    HeadSkipping,
    Oracle,
    Random,
    Threshold,
    TokenSkipping,
    TopK,
    generate,
)
from dmoe_var.errors import InputError
from dmoe_var.models.var import check_labels
from dmoe_var.moe import experts
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.experts import paths, triton
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.sampling.draw import Drawing
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.sampling_time import sampling

LABELS = [0, 3, 5]
A_CALL = {"models/var.py:check_labels": 1, "sampling_time.py:end": 1}
"""Of `generate`: labels go to the GPU when it begins, and all checks come back when it ends."""
GROUPED = {"moe/experts/dispatch.py:tokens_P": 4, "moe/experts/dispatch.py:counts": 4}
"""`grouped` has to know each expert's tokens: two waits in each layer of each sparse scale."""
SMALL = {"top_k": 20, "top_p": 0.9}
RATIOS = (0.0, 0.0, 0.4, 0.5)
BY_DISTANCE, BY_ROUTER = (TokenSkipping(RATIOS, m, first_layer=1) for m in ("distance", "router"))


def moved(models, device="cpu", dtype=torch.float32):
    """Copies elsewhere."""
    return [copy.deepcopy(model).to(device, dtype) for model in models]


def test_what_is_found(cuda_dry_run):
    """Each way to wait, and a tensor that was left on the CPU."""
    with cuda_dry_run() as run:
        x, index = torch.ones(3, device="cuda"), torch.tensor([0])
        for wait in (
            lambda: x[0].item(),
            lambda: 1 if x[0] > 0 else 0,
            lambda: x[index],
            lambda: x[x > 0],
            lambda: torch.equal(x, x),
            lambda: index.to("cuda"),
            x.nonzero,
            x.tolist,
            x.cpu,
        ):
            run.waits.clear()
            wait()
            assert run.waits.total() == 1
        run.waits.clear()
        assert (x * 2 + x.sum()).is_cuda
        assert not run.waits
        with pytest.raises(AssertionError, match="left on the CPU"):
            x + torch.ones(3)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def both(request, tiny_models, cuda_dry_run):
    """The models on the CPU, and on the GPU."""
    with cuda_dry_run():
        there = moved(tiny_models, "cuda", request.param)
    return moved(tiny_models, dtype=request.param), there


@pytest.mark.parametrize(
    ("dense", "options", "more_waits"),
    [
        (True, SMALL, {}),
        (True, {"cfg": 0.0, "top_k": 0, "more_smooth": True}, {}),
        (False, {"impl": "reference", "tau": 0.4, "adaln_every_scale": True}, {}),
        (False, {"impl": "grouped", "tau": 0.4, "cfg": 0.0}, GROUPED),
        (False, {"impl": "auto", "tau": 0.4}, {}),  # experts are one operator, not looked into
        (False, {"impl": "reference", "tau": 0.4, "means": True}, {}),
        (True, {"skipping": BY_DISTANCE, "cfg": (1.5, 1.5, 1.5, 0.0)}, {}),
        (False, {"skipping": BY_ROUTER, "impl": "reference", "tau": 0.4}, {}),
        (True, {"heads": HeadSkipping((0.0, 0.0, 0.5, 0.5))}, GROUPED),
    ],
    ids=[
        "dense",
        "dense unguided",
        "reference",
        "grouped unguided",
        "auto",
        "means",
        "dense skipping",
        "skipping by router",
        "heads",
    ],
)
def test_images(both, cuda_dry_run, dense, options, more_waits):
    options = dict(options)
    means = {si: torch.linspace(-1, 1, 1024).view(2, 8, 64) for si in (2, 3)}
    skipped = SkippedMeans(means) if options.pop("means", False) else None
    with cuda_dry_run():
        for model, _ in both:
            model.set_skipped(skipped)
    here, there = ((model.dense if dense else model, vqvae) for model, vqvae in both)
    counts, counts_there = ExpertCounts(), ExpertCounts()
    on_cpu = generate(*here, LABELS, observer=counts, **options)
    with cuda_dry_run() as run:
        on_gpu = generate(*there, LABELS, observer=counts_there, **options)
        assert run.waits == A_CALL | more_waits
        assert on_gpu.is_cuda
        assert on_gpu.isfinite().all()
        assert counts_there.scales == counts.scales
        if next(here[0].parameters()).dtype == torch.bfloat16:
            return  # the CPU rounds elsewhere
        assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-4)
        for si in counts.scales:
            assert torch.equal(counts_there.per_token(si).cpu(), counts.per_token(si))


@pytest.mark.parametrize(
    "rule", [Threshold(0.4), TopK(2), Cumulative(0.5), Random(2), Oracle(0.4)], ids=repr
)
def test_selection(tiny_models, cuda_dry_run, rule):
    """Router, rule, experts and counts of a layer."""
    ffn = tiny_models[0].moe.blocks[0].ffn
    x_BLC = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ffn(x_BLC, Routing(rule, impl="reference"))
    with cuda_dry_run() as run, sampling():
        (ffn,), x_BLC, counts = moved([ffn], "cuda"), x_BLC.to("cuda"), ExpertCounts()
        run.waits.clear()
        out_BLC = ffn(x_BLC, Routing(rule, impl="reference", observer=counts))
        assert not run.waits
        assert_close(out_BLC.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moe.blocks.1.ffn.router.fc2.weight", "an expert's score is not finite"),
        ("moe.head.weight", "the logits of scale 2 are not finite"),
    ],
)
def test_what_is_not_finite_is_refused_as_on_the_cpu(tiny_models, cuda_dry_run, name, message):
    models = moved(tiny_models)
    with torch.no_grad():
        models[0].get_parameter(name)[0, 0] = torch.nan
    with pytest.raises(InputError, match=message):
        generate(*models, LABELS, tau=0.4)
    with cuda_dry_run(), pytest.raises(InputError, match=message):
        generate(*moved(models, "cuda"), LABELS, tau=0.4, impl="reference")


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_drawing(both, cuda_dry_run, impl):
    """What evaluate draws a batch with: images and counts come back."""
    here, there = both
    config = SamplingConfig(top_k=20, top_p=0.9, batch_size=3)
    given = (np.array([0, 1, 2, 3]), 5, config, Threshold(0.4), impl)
    expected = Drawing(*here, *given).batch(1)
    with cuda_dry_run() as run:
        batch = Drawing(*there, *given).batch(1)
        after = {"data/images.py:to_uint8": 1, "moe/counts.py:of": 2}
        assert run.waits == A_CALL | after
    if next(here[0].parameters()).dtype == torch.bfloat16:
        return  # the CPU rounds elsewhere
    difference = np.abs(batch.samples.images.astype(int) - expected.samples.images)
    assert difference.max() <= 1
    assert batch.ran == expected.ran


class Played:
    """The kernels of triton_kernels.py, by torch on the values; the grid says nothing."""

    def __init__(self):
        self.ran = Counter()

    def __getattr__(self, name):
        kernel = getattr(type(self), f"_{name}")

        def launch(*given, **named):
            self.ran[name] += 1
            kernel(*(getattr(x, "value", x) for x in given), **named)

        return defaultdict(lambda: launch)

    @staticmethod
    def _row_lists(mask_NE, rows_BET, counts_BE, N, E, T, **_):
        padded = torch.zeros(len(rows_BET) * T, E, dtype=torch.int8)
        padded[:N] = mask_NE
        mask_BET = padded.view(-1, T, E).transpose(1, 2)
        order = torch.sort(mask_BET, dim=-1, descending=True, stable=True)
        rows_BET.copy_(order.indices)
        counts_BE.copy_(mask_BET.sum(-1))

    @staticmethod
    def _zeros(_rows, _counts, h_NH, _N, _E, **_):
        h_NH.fill_(0)

    @staticmethod
    def _fc1(x_NC, w1_EDC, b1_ED, rows_BET, counts_BE, h_NH, _N, _C, E, T, **_):
        h_NED = h_NH.view(len(h_NH), E, -1)
        for block, e in product(range(len(counts_BE)), range(E)):
            rows = block * T + rows_BET[block, e, : counts_BE[block, e]].long()
            h_NED[rows, e] = torch.relu(F.linear(x_NC[rows], w1_EDC[e], b1_ED[e]))


def test_triton_within_generate(both, cuda_dry_run, monkeypatch):
    """Its launcher asks nothing of the device, and what it is given makes the CPU's images."""
    here, there = both
    on_cpu = generate(*here, LABELS, tau=0.4, impl="reference", **SMALL)
    played = Played()
    monkeypatch.setattr(experts, "FakeTensor", type(None))  # no operator in the path's place
    monkeypatch.setattr(triton, "can_run", lambda *_: True)
    monkeypatch.setitem(
        paths._loaded, "triton", replace(paths.path("triton"), can_run=triton.can_run)
    )
    monkeypatch.setattr(triton, "kernels", lambda: played)
    monkeypatch.setattr(triton, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    with cuda_dry_run() as run:
        on_gpu = generate(*there, LABELS, tau=0.4, impl="triton", **SMALL)
        assert run.waits == A_CALL
        layers = 2 * 2  # of two scales
        assert played.ran == {"row_lists": layers, "zeros": layers, "fc1": layers}
        assert on_gpu.isfinite().all()
        if next(here[0].parameters()).dtype == torch.float32:
            assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-4)


def test_labels(cuda_dry_run):
    """However they are given, they come to the GPU in one copy."""
    with cuda_dry_run() as run:
        on_gpu = torch.tensor(LABELS, device="cuda")
        for given in (LABELS, np.array(LABELS), torch.tensor(LABELS), on_gpu):
            run.waits.clear()
            labels_B = check_labels(given, 5, on_gpu.device)
            assert run.waits.pop("models/var.py:check_labels") == 1
            assert run.waits == ({"values.py:_python": 1} if given is on_gpu else {})
            assert labels_B.is_cuda
            assert labels_B.tolist() == LABELS


def test_tokens_and_teacher(tiny_models, make_teacher, cuda_dry_run):
    """The VQ-VAE both ways, and both models over a teacher's tokens."""
    model, vqvae = tiny_models
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = vqvae.encode(images)
    decoded, teacher = vqvae.decode(tokens), vqvae.teacher_input(tokens)
    logits, dense_logits = model(LABELS, teacher, tau=0.4), model.dense(LABELS, teacher)
    with cuda_dry_run() as run, torch.no_grad():
        (model, vqvae), images = moved(tiny_models, "cuda"), images.to("cuda")
        run.waits.clear()
        found = vqvae.encode(images)
        found_teacher = vqvae.teacher_input(found)
        found_decoded = vqvae.decode(found)
        assert not run.waits
        found_dense = model.dense(LABELS, found_teacher)
        assert run.waits == {"models/var.py:check_labels": 1}
        found_logits = model(LABELS, found_teacher, tau=0.4, impl="reference")
        for there, here in zip(
            [*found, found_decoded, found_teacher, found_dense, found_logits],
            [*tokens, decoded, teacher, dense_logits, logits],
            strict=True,
        ):
            assert_close(there.cpu(), here, rtol=0, atol=1e-4)
