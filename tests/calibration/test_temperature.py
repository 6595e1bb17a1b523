"""Temperatures: entropies that a known one changes, and what cannot be matched."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dmoe_var import DynamicVAR, Threshold
from dmoe_var.calibration.temperature import entropy, temperatures
from dmoe_var.errors import InputError


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


def test_too_far_apart(make_var, make_moe, make_teacher):
    dense = make_var(seed=0, activation="relu")
    colder = copy.deepcopy(dense)
    with torch.no_grad():
        colder.head.weight.mul_(3)
    model = DynamicVAR(dense, make_moe(colder), (2, 3))
    images = Images((torch.tensor([1]), make_teacher(dense, 1)))
    with pytest.raises(InputError, match=r"calibrate.temperature=true: none from 0.7 to 1.3 gives"):
        temperatures(model, images, [Threshold(0.0)] * 2, [0.0] * 4, "reference")
