"""Losses that are measured once, and kept for the configuration that they are of."""

from __future__ import annotations

import pytest

from dmoe_var.calibration.losses import CrossEntropy
from dmoe_var.moe.selection import LayerThreshold, Threshold


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """losses(fingerprint, values) -> a CrossEntropy that measures those values, one a call."""

    def losses(fingerprint, values):
        left = iter(values)
        loss = CrossEntropy(None, None, "grouped", False, tmp_path / "kept.jsonl", fingerprint)
        monkeypatch.setattr(loss, "_measure", lambda rules: next(left))
        return loss

    return losses


def test_losses_are_kept_for_their_own_configuration_alone(losses):
    """Every rule by itself; another fingerprint measures anew and takes the file over."""
    a, b, c = [Threshold(0.1)], [Threshold(0.2)], [LayerThreshold((0.1, 0.2))]
    first = losses("ours", [1.0, 2.0, 3.0])
    assert [first(rules) for rules in (a, b, c, a)] == [1, 2, 3, 1]
    assert first.count == 4
    again = losses("ours", [9.0])
    assert [again(rules) for rules in (c, b, a, [Threshold(0.3)])] == [3, 2, 1, 9]
    other = losses("other", [4.0, 5.0])
    assert [other(rules) for rules in (a, b)] == [4, 5]
    assert [losses("other", [])(rules) for rules in (a, b)] == [4, 5]
    assert losses("ours", [6.0])(a) == 6
