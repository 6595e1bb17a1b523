"""Guidance scale by scale: what it draws, what stops with it, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import Random, Threshold, generate
from dmoe_var.metrics.flops import count_flops, report
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.models.guidance import branches, by_scale, guide, text
from dmoe_var.moe.counts import ExpertCounts, ExpertHistogram

LABELS = [0, 1, 2, 3]
SMALL = {"top_k": 20, "top_p": 0.9, "seed": 2}
ENDS = (1.5, 1.5, 0.0, 0.0)
NEVER_ENDS = (1.5, 1.5, 0.0, 1e-30)
"""Guides as ENDS does, since 1 + 1e-30 is 1, but runs both halves at every scale."""


def test_guide():
    logits = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    cond, null = logits[:3], logits[3:]
    for t in (0.0, 1.0, 2.5):
        assert_close(guide(logits, t), cond + t * (cond - null))


@pytest.mark.parametrize(
    ("cfg", "expected", "rows"),
    [
        (1.5, (1.5, 1.5, 1.5), (2, 2, 2)),
        ([2], (2.0, 2.0, 2.0), (2, 2, 2)),
        (0, (0.0, 0.0, 0.0), (1, 1, 1)),
        (torch.tensor([2.0, 1.0, 0.0]), (2.0, 1.0, 0.0), (2, 2, 1)),
        ((1, 0, 0), (1.0, 0.0, 0.0), (1, 1, 1)),
        ((0, 0, 3), (0.0, 0.0, 3.0), (2, 2, 2)),
    ],
)
def test_values_by_scale(cfg, expected, rows):
    assert by_scale(cfg, 3) == expected
    assert branches(expected) == rows


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ((1.5, 0), r"cfg=\(1.5, 0\) has 2 values; allowed: 1, or one for each of 3 scales"),
        ((), r"cfg=\(\) has 0 values"),
        (-1, r"cfg=-1.0 is not within \[0, 1000\]"),
        (1e300, r"cfg=1e\+300 is not within \[0, 1000\]"),
        ((1, 1, float("nan")), "cfg=nan"),
        ("strong", "cfg='strong' must be a number"),
    ],
)
def test_wrong_values_raise(cfg, message):
    with pytest.raises(ValueError, match=message):
        by_scale(cfg, 3)


def test_in_a_title():
    assert (text(1.5), text((1.5, 0.0))) == ("1.5", "1.5,0")


@pytest.mark.parametrize("options", [{}, {"tau": 0.5}, {"selection": Random(2)}], ids=str)
def test_equal_values_are_the_plain_sampler(dynamic, vqvae, options):
    plain, by_scales = (
        generate(dynamic, vqvae, LABELS, cfg, **SMALL, **options) for cfg in (1.5, (1.5,) * 4)
    )
    assert torch.equal(plain, by_scales)


@pytest.mark.parametrize("options", [{}, {"tau": 0.5}, {"tau": 0.5, "share_mask": True}], ids=str)
def test_the_unconditional_half_stops(dynamic, vqvae, options):
    """The images are those of a sampler that runs it in vain; its rows run no experts."""
    rows, images = [], []
    for cfg in (ENDS, NEVER_ENDS, 1.5):
        counts = ExpertCounts()
        given = {**SMALL, **options, "observer": counts}
        images.append(generate(dynamic, vqvae, LABELS, cfg, **given))
        rows.append([counts.per_token(si).shape[1] for si in counts.scales])
    assert rows == ([[4, 4], [8, 8], [8, 8]] if options else [[], [], []])
    assert_close(images[0], images[1], rtol=0, atol=1e-4)
    assert (images[0] - images[2]).abs().max() > 1e-2


def test_keys_and_values_of_the_other_half_are_freed(dynamic, vqvae, monkeypatch):
    caches, rows = [], []

    class Sees(ExpertCounts):
        def on_scale(self, si, f_hat_BCHW):
            rows.append(caches[0]._k_NBHLD.untyped_storage().nbytes())

    new_cache = dynamic.dense.new_cache
    monkeypatch.setattr(
        dynamic.dense, "new_cache", lambda batch: caches.append(new_cache(batch)) or caches[-1]
    )
    generate(dynamic, vqvae, LABELS, ENDS, observer=Sees(), **SMALL)
    assert len(caches) == 1
    assert rows == [rows[0], rows[0], rows[0] // 2, rows[0] // 2]


@pytest.mark.parametrize("tau", [None, 0.5])
def test_flops(dynamic, vqvae, tau):
    """Half of every part from where guidance ends, AdaLN of the second model included."""
    guided, unguided, ends = (
        count_flops(dynamic, vqvae, LABELS, cfg=cfg, tau=tau, **SMALL) for cfg in (1.5, 0, ENDS)
    )
    assert ends.fixed.branches == (2, 2, 1, 1)
    for part, macs in ends.fixed.macs.items():
        both, one = guided.fixed.macs[part], unguided.fixed.macs[part]
        assert macs == (*both[:2], *one[2:]), part
    for si, cost in ends.fixed.experts.items():
        assert cost == unguided.fixed.experts[si]
        assert 2 * cost.num_pairs == guided.fixed.experts[si].num_pairs
    assert unguided.total_gmac < ends.total_gmac < guided.total_gmac


def test_counts_of_other_rows_are_refused(dynamic, vqvae):
    counts, rules = ExpertCounts(), {2: Threshold(0.5), 3: Threshold(0.5)}
    generate(dynamic, vqvae, LABELS, ENDS, tau=0.5, observer=counts, **SMALL)
    ran = ExpertHistogram.of(counts, rules, len(LABELS))
    report(fixed_cost(dynamic, vqvae, ENDS), ran, rules)
    with pytest.raises(ValueError, match="at 2 rows an image"):
        report(fixed_cost(dynamic, vqvae), ran, rules)
