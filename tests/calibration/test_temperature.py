"""Temperatures: entropies that a known one changes, and what cannot be matched."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from dmoe_var import DynamicVAR, Threshold
from dmoe_var.calibration.temperature import entropy, temperatures
from dmoe_var.errors import InputError
from dmoe_var.models.dynamic_var import teacher_forced


class Images:
    """Batches of labels and teacher input."""

    def __init__(self, *batches):
        self.given = batches

    def batches(self):
        return [(labels, teacher, None) for labels, teacher in self.given]


def test_entropy_by_hand():
    assert entropy(torch.zeros(2, 3, 8)) == pytest.approx(math.log(8))
    halves = torch.tensor([[[0.0, 0.0, -torch.inf]]]).clamp_min(-1e9)
    assert entropy(halves) == pytest.approx(math.log(2))


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_a_colder_model_is_warmed_to_the_dense_one(make_var, make_moe, make_teacher, strength):
    """The second model is the dense one with larger logits: 1.25 times at each of its scales. Its
    entropy is matched by 1.25, whatever the guidance, which is linear."""
    dense = make_var(seed=0, activation="relu")
    colder = copy.deepcopy(dense)
    with torch.no_grad():
        colder.head.weight.mul_(1.25)
        colder.head.bias.mul_(1.25)
    model = DynamicVAR(dense, make_moe(colder), (1, 3))
    batches = [
        (torch.tensor([0, 3, 4]), make_teacher(dense, 3, seed=1)),
        (torch.tensor([2]), make_teacher(dense, 1, seed=2)),
    ]
    rules = [Threshold(0.0)] * 2
    found = temperatures(model, Images(*batches), rules, [strength] * 4, "reference")
    assert found[0] == found[2] == 1
    assert [found[1], found[3]] == pytest.approx([1.25, 1.25], abs=2e-3)


def test_halves_under_one_mask(make_var, make_moe, make_teacher, monkeypatch):
    """Entropies by hand: rows of both halves, of which the second runs what the first selects. The
    conditional half alone, at strength 0, knows nothing of it."""
    monkeypatch.setattr("dmoe_var.calibration.temperature.GRID", np.linspace(0.05, 8, 200))
    dense = make_var(seed=0, activation="relu")
    model = DynamicVAR(dense, make_moe(make_var(seed=1, activation="relu")), (1, 3))
    labels_B, teacher_BLC = torch.tensor([0, 3, 4]), make_teacher(dense, 3, seed=1)
    rules, images = [Threshold(0.8)] * 2, Images((labels_B, teacher_BLC))

    def found(strength, share_mask):
        given = (images, rules, [strength] * 4, "reference", share_mask)
        return temperatures(model, *given)

    assert found(0.0, True) == found(0.0, False)
    assert found(3.0, True) != found(3.0, False)
    by_rule = dict(zip((1, 3), rules, strict=True))
    walked = teacher_forced(
        model, labels_B, teacher_BLC, by_rule, "reference", branches=[2] * 4, share_mask=True
    )
    with torch.no_grad():
        cond, null = torch.cat([*walked], dim=1).chunk(2)
        dense_cond = dense(labels_B, teacher_BLC)
        dense_null = dense(torch.full_like(labels_B, model.config.num_classes), teacher_BLC)
    for si in (1, 3):
        tokens, t = model.config.scale_slices[si], found(3.0, True)[si]
        ours = ((4 * cond - 3 * null) / t)[:, tokens]
        theirs = (4 * dense_cond - 3 * dense_null)[:, tokens]
        assert float(entropy(ours)) == pytest.approx(float(entropy(theirs)), rel=1e-3)


def test_too_far_apart(make_var, make_moe, make_teacher):
    dense = make_var(seed=0, activation="relu")
    colder = copy.deepcopy(dense)
    with torch.no_grad():
        colder.head.weight.mul_(3)
    model = DynamicVAR(dense, make_moe(colder), (2, 3))
    images = Images((torch.tensor([1]), make_teacher(dense, 1)))
    with pytest.raises(InputError, match=r"calibrate.temperature=true: none from 0.7 to 1.3 gives"):
        temperatures(model, images, [Threshold(0.0)] * 2, [0.0] * 4, "reference")
