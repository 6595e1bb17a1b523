"""Guidance, filters, draws and random streams against loops, softmax and statistics."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from dmoe_var.sampling import token_sampling
from dmoe_var.sampling.token_sampling import (
    ROUTING,
    TOKENS,
    ImageStreams,
    _given,
    by_scale,
    draw_tokens,
    filter_logits,
    soft_mix,
    stream_seed,
)

CPU = torch.device("cpu")
PROBABILITIES = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04, 0.0]


def random_logits(*shape, spread=2.0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def naive_filter(row, top_k, top_p):
    """Kept indices of one row of logits: top-k (ties kept), then top-p of what is left (of ties
    those with the highest indices: Python's sort leaves them in order)."""
    kept = list(range(len(row)))
    if top_k > 0:
        least = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
        kept = [i for i in kept if row[i] >= least]
    if top_p > 0:
        kept.sort(key=lambda i: row[i])
        total, running, left = sum(math.exp(row[i]) for i in kept), 0.0, []
        for i in kept:
            running += math.exp(row[i]) / total
            if running > 1 - top_p or i == kept[-1]:
                left.append(i)
        kept = left
    return sorted(kept)


# Filters


@pytest.mark.parametrize(
    ("device", "by_numpy"), [("cpu", True), ("cpu", False), ("cuda", False)], ids=str
)
@pytest.mark.parametrize("top_k", [0, 1, 10, 900])
@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.7, 0.93, 1.0])
@pytest.mark.parametrize("ties", ["none", "in some rows", "in all rows"])
def test_filters_by_loops(top_k, top_p, device, by_numpy, ties, cuda_dry_run, monkeypatch):
    """Also where a row's batch holds ties that it has none of."""
    monkeypatch.setattr(token_sampling, "_numpy_sorts_faster", lambda _: by_numpy)
    logits_BlV = random_logits(3, 20, 40)
    if ties != "none":
        tied = slice(None) if ties == "in all rows" else slice(1)
        logits_BlV[tied] = logits_BlV[tied].mul(4).round() / 4
    with cuda_dry_run() if device == "cuda" else nullcontext():
        given = logits_BlV.to(device)
        filtered = filter_logits(given, top_k, top_p).cpu()
        assert torch.equal(given.cpu(), logits_BlV)
    for row, out in zip(logits_BlV.flatten(0, 1).tolist(), filtered.flatten(0, 1), strict=True):
        assert out.isfinite().nonzero().flatten().tolist() == naive_filter(row, top_k, top_p)
    kept = filtered.isfinite()
    assert torch.equal(filtered[kept], logits_BlV[kept])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_top_k_keeps_what_ties_with_the_kth(top_p, device, cuda_dry_run):
    with cuda_dry_run() if device == "cuda" else nullcontext():
        logits_11V = torch.tensor([[[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]]]).to(device)
        kept = filter_logits(logits_11V, 2, top_p).cpu().isfinite()
    assert kept.nonzero()[:, 2].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("top_p", "left"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.8, 4)])
def test_top_p_drops_at_exactly_the_limit(top_p, left):
    """Four tokens of probability 1/4: the running sums are exact."""
    assert filter_logits(torch.zeros(1, 1, 4), 0, top_p).isfinite().sum() == left


# Draws


def assert_drawn_from(tokens, probabilities):
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).tolist()
    expected = [p * sum(counts) for p in probabilities]
    possible = [(c, e) for c, e in zip(counts, expected, strict=True) if e > 0]
    assert sum(c for c, _ in possible) == sum(counts)
    assert chisquare(*zip(*possible, strict=True)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("batch", "num_tokens"), [(1, 30000), (3000, 10)], ids=["one stream", "first draws of many"]
)
def test_tokens_are_drawn_from_the_softmax(batch, num_tokens):
    logits = torch.tensor(PROBABILITIES).log() + 3.0
    streams = ImageStreams(0, 0, batch, CPU)
    tokens = draw_tokens(logits.expand(batch, num_tokens, -1), streams)
    assert tokens.shape == (batch, num_tokens)
    assert_drawn_from(tokens, PROBABILITIES)


def test_one_generator_draws_what_multinomial_draws():
    logits = random_logits(3, 50, 20)
    streams = ImageStreams(9, 9, 3, CPU, torch.Generator().manual_seed(5))
    probabilities = logits.flatten(0, 1).softmax(-1)
    expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_tokens(logits, streams).flatten(), expected.flatten())


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_soft_mix_by_loops(progress):
    logits, codes = random_logits(2, 3, 6).double(), random_logits(6, 4).double()
    noise = ImageStreams(0, 0, 2, CPU).exponential(3, 6).tolist()
    mixed = soft_mix(logits, codes, progress, ImageStreams(0, 0, 2, CPU))
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    for b in range(2):
        for i in range(3):
            scores = [
                (value.item() * (1 + progress) - math.log(e)) / temperature
                for value, e in zip(logits[b, i], noise[b][i], strict=True)
            ]
            weights = [math.exp(s - max(scores)) for s in scores]
            expected = sum(w / sum(weights) * c for w, c in zip(weights, codes, strict=True))
            assert_close(mixed[b, i], expected, rtol=0, atol=1e-5)


# Temperature


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (0.9, (0.9,) * 3), ([0.5], (0.5,) * 3), ([1, 1, 0.9], (1.0, 1.0, 0.9))],
)
def test_temperature_of_each_scale(given, expected):
    assert by_scale(given, 3) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, r"temperature=0.0 is not within \[0.01, 100.0\]"),
        ([1, 1], r"temperature=\(1.0, 1.0\) has 2 values; allowed: 1, or one for each of 3 scales"),
        ("warm", "temperature='warm' must be a number"),
    ],
)
def test_no_temperature(given, said):
    with pytest.raises(ValueError, match=said):
        by_scale(_given(given), 3)


# Streams


def test_no_two_images_share_a_stream():
    """torch's CPU generator reads the low 32 bits of a seed only. The indices come from all of
    their 2**32: of a mapping that loses a bit, ten pairs or more would fall together."""
    drawn = np.random.default_rng(0).integers(2**32, size=300_000)
    indices = np.unique(np.concatenate([drawn, np.arange(20_000)])).tolist()
    low = {stream_seed(0, index, TOKENS) & 0xFFFFFFFF for index in indices}
    assert len(low) == len(indices)


def test_seed_and_purpose_change_every_stream():
    kinds = [(0, TOKENS), (1, TOKENS), (-1, TOKENS), (0, ROUTING), (1, ROUTING)]
    streams = [[stream_seed(s, i, p) & 0xFFFFFFFF for i in range(1000)] for s, p in kinds]
    assert len({seed for stream in streams for seed in stream}) == len(kinds) * 1000
    assert all(0 <= stream_seed(s, 7, p) < 2**64 for s, p in kinds)


def test_tokens_and_routing_have_streams_of_their_own():
    streams = ImageStreams(3, 7, 2, CPU)
    drawn = streams.exponential(4, 6), streams.routing_noise(4, 6, branches=1)
    for index in (0, 1):
        tokens, routing = (
            torch.Generator().manual_seed(stream_seed(3, 7 + index, purpose))
            for purpose in (TOKENS, ROUTING)
        )
        assert torch.equal(drawn[0][index], torch.empty(4, 6).exponential_(generator=tokens))
        assert torch.equal(drawn[1][index], torch.rand(4, 6, generator=routing))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (101, 1009)])
def test_exponentials_are_those_of_torch(monkeypatch, at_once, shape):
    """As many of them as a scale needs, from the stream of its image."""
    if at_once and not token_sampling._inverts_uniform():
        pytest.skip("torch draws them otherwise on this processor")
    monkeypatch.setattr(token_sampling, "_inverts_uniform", lambda: at_once)
    ours, theirs = ImageStreams(5, 0, 2, CPU), ImageStreams(5, 0, 2, CPU)._token_streams
    for _ in range(2):  # the second scale goes on where the first one ended
        noise = ours.exponential(*shape)
        assert noise.dtype == torch.float32
        for found, stream in zip(noise, theirs, strict=True):
            assert torch.equal(found, torch.empty(shape).exponential_(generator=stream))


def test_the_faster_sort_is_measured(monkeypatch):
    """For each number of threads once."""
    asked, seconds = [], iter([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, *[1.0] * 3, *[0.5] * 3])
    monkeypatch.setattr(
        token_sampling, "seconds_of", lambda sort, device: asked.append(sort()) or next(seconds)
    )
    measured = cache(token_sampling._numpy_sorts_faster.__wrapped__)
    assert [measured(1), measured(1), measured(2)] == [False, False, False]
    assert len(asked) == 12
    assert np.array_equal(asked[0], asked[3].values.numpy())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.parametrize("left", [0, 21])
def test_numpy_sorts_nothing_that_others_watch(monkeypatch, left):
    """Fake tensors, torch.func, and torch.jit, which has to sort other logits later."""
    monkeypatch.setattr(token_sampling, "_numpy_sorts_faster", lambda threads: True)
    logits, others = random_logits(6, 30), torch.rand(6, 30)

    def ascending(logits):
        return token_sampling._ascending(logits, left)

    with FakeTensorMode() as fake:
        assert ascending(fake.from_tensor(logits)).shape == (6, 30 - left)
    assert torch.equal(torch.vmap(ascending)(logits), logits.sort().values[:, left:])
    assert torch.equal(torch.jit.trace(ascending, logits)(others), others.sort().values[:, left:])


def test_exponentials_beside_another_default_device(monkeypatch):
    expected = ImageStreams(5, 0, 2, CPU).exponential(3, 4)
    monkeypatch.setattr(
        token_sampling, "_inverts_uniform", cache(token_sampling._inverts_uniform.__wrapped__)
    )
    with torch.device("meta"):
        assert torch.equal(ImageStreams(5, 0, 2, CPU).exponential(3, 4), expected)


def test_ties_beside_another_default_device():
    logits_11V = torch.tensor([[[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]]])
    with torch.device("meta"):
        kept = filter_logits(logits_11V, 2, 1.0).isfinite()
    assert kept.nonzero()[:, 2].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["dtype", "learns"])
def test_filters_of_other_logits(kind):
    """In bfloat16, and with gradients through what is kept."""
    logits = random_logits(2, 5, 30).bfloat16().float()
    expected = filter_logits(logits, 9, 0.7)
    if kind == "dtype":
        assert torch.equal(
            filter_logits(logits.bfloat16(), 9, 0.0).float().isfinite(),
            filter_logits(logits, 9, 0.0).isfinite(),
        )
        return
    given = logits.clone().requires_grad_()
    kept = filter_logits(given, 9, 0.7)
    assert torch.equal(kept, expected)
    kept[kept.isfinite()].sum().backward()
    assert torch.equal(given.grad, expected.isfinite().float())


@pytest.mark.parametrize("draw", ["exponential", "routing_noise"])
def test_an_image_has_its_own_stream(draw):
    """Rows are images, or with branches the conditional ones of all images, then the others."""

    def drawn(start_index, batch, seed=0):
        streams = ImageStreams(seed, start_index, batch, CPU)
        if draw == "exponential":
            scales = [streams.exponential(n, 6)[None] for n in (1, 4)]
        else:
            scales = [streams.routing_noise(n, 6, branches=2).unflatten(0, (2, -1)) for n in (1, 4)]
        return torch.cat(scales, dim=2)  # (branches, B, l, ...)

    together = drawn(0, 4)
    alone = torch.cat([drawn(i, 1) for i in range(4)], dim=1)
    halves = torch.cat([drawn(0, 2), drawn(2, 2)], dim=1)
    assert torch.equal(together, alone)
    assert torch.equal(together, halves)
    rows = together.flatten(0, 2).tolist()
    assert all(a != b for a, b in pairwise(sorted(rows)))
    assert not torch.equal(drawn(0, 4, seed=1), together)


def test_noise_is_exponential_or_uniform():
    streams = ImageStreams(0, 0, 3, CPU)
    drawn = {"expon": streams.exponential(50, 40), "uniform": streams.routing_noise(50, 20, 2)}
    assert drawn["uniform"].shape == (6, 50, 20)
    for name, noise in drawn.items():
        assert kstest(noise.flatten().numpy(), name).pvalue > 1e-3
