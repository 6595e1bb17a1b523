"""The digit classifier: right about as often as on the original 8 x 8 digits, at any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from dmoe_var.data.images import to_uint8
from dmoe_var.errors import InputError
from dmoe_var.metrics.agreement import LabelAgreement

NUM_TRAIN = 1437


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits in a fixed random order: 64 greys in [0, 16] each, and classes."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.data[order], data.target[order]


def enlarged(greys_NP, size):
    """The digits as RGB images, uint8 (N, size, size, 3), by bicubic interpolation."""
    x_N1HW = torch.from_numpy(greys_NP).float().view(-1, 1, 8, 8) / 16
    x_N1HW = F.interpolate(x_N1HW, size=(size, size), mode="bicubic", align_corners=False)
    return to_uint8(x_N1HW.clamp(0, 1).repeat(1, 3, 1, 1))


@pytest.mark.parametrize("size", [8, 16, 32])
def test_held_out_digits_are_recognised_like_the_originals(digits, size):
    greys, classes = digits
    images = enlarged(greys, size)
    agreement = LabelAgreement(images[:NUM_TRAIN], classes[:NUM_TRAIN])
    plain = SVC(gamma=0.001).fit(greys[:NUM_TRAIN], classes[:NUM_TRAIN])
    expected = plain.score(greys[NUM_TRAIN:], classes[NUM_TRAIN:])

    accuracy = agreement.accuracy(images[NUM_TRAIN:], classes[NUM_TRAIN:])

    assert accuracy > 0.98
    assert accuracy == pytest.approx(expected, abs=0.01)
    if size == 8:  # greys on the scale that gamma is tuned for: the same decisions
        predicted = agreement.predict(images[NUM_TRAIN:])
        assert np.mean(predicted == plain.predict(greys[NUM_TRAIN:])) > 0.995


def test_wrong_labels_count_as_wrong(digits):
    greys, classes = digits
    images = enlarged(greys[:400], 16)
    agreement = LabelAgreement(images, classes[:400])
    seen = agreement.predict(images)
    labels = seen.copy()
    labels[:100] = (labels[:100] + 1) % 10
    assert agreement.accuracy(images, labels) == 0.75


def test_all_channels_count():
    """The grey is the mean of the channels, so their order cannot matter."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    classes = rng.integers(0, 3, 60)
    agreement = LabelAgreement(images, classes)
    for channels in ([1, 2, 0], [2, 0, 1]):
        assert np.array_equal(agreement.predict(images[..., channels]), agreement.predict(images))


IMAGES = np.zeros((4, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [(IMAGES / 255, "uint8"), (IMAGES[:, :7], r"at least 8 x 8 pixels; got \(7, 16\)")],
)
def test_bad_images_are_one_clear_line(images, message):
    with pytest.raises(InputError, match=message) as caught:
        LabelAgreement(images, np.array([0, 0, 1, 1]))
    assert "\n" not in str(caught.value)
