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


@pytest.mark.parametrize("size", [16, 32])
def test_held_out_digits_are_recognised_like_the_originals(digits, size):
    greys, classes = digits
    images = enlarged(greys, size)
    agreement = LabelAgreement(images[:NUM_TRAIN], classes[:NUM_TRAIN])
    plain = SVC(gamma=0.001).fit(greys[:NUM_TRAIN], classes[:NUM_TRAIN])
    expected = plain.score(greys[NUM_TRAIN:], classes[NUM_TRAIN:])

    accuracy = agreement.accuracy(images[NUM_TRAIN:], classes[NUM_TRAIN:])

    assert accuracy > 0.98
    assert accuracy == pytest.approx(expected, abs=0.01)


def test_wrong_labels_count_as_wrong(digits):
    greys, classes = digits
    images = enlarged(greys[:400], 16)
    agreement = LabelAgreement(images, classes[:400])
    seen = agreement.predict(images)
    labels = seen.copy()
    labels[:100] = (labels[:100] + 1) % 10
    assert agreement.accuracy(images, labels) == 0.75


def test_brightness_is_on_the_scale_that_gamma_is_tuned_for(digits):
    """At 8 x 8 the classifier's decisions are those of scikit-learn's own on the raw greys."""
    greys, classes = digits
    agreement = LabelAgreement(enlarged(greys[:300], 8), classes[:300])
    plain = SVC(gamma=0.001).fit(greys[:300], classes[:300])
    predicted = agreement.predict(enlarged(greys[300:], 8))
    assert np.mean(predicted == plain.predict(greys[300:])) > 0.995


def test_all_channels_count():
    """The grey is the mean of the channels, so their order cannot matter."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    classes = rng.integers(0, 3, 60)
    agreement = LabelAgreement(images, classes)
    for channels in ([1, 2, 0], [2, 0, 1]):
        assert np.array_equal(agreement.predict(images[..., channels]), agreement.predict(images))


IMAGES = np.zeros((4, 16, 16, 3), np.uint8)
LABELS = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES / 255, LABELS, "uint8"),
        (IMAGES[..., 0], LABELS, r"\(4, 16, 16\)"),
        (IMAGES[:, :7], LABELS, r"at least 8 x 8 pixels; got \(7, 16\)"),
        (IMAGES, LABELS[:3], r"\(4,\), one an image; got \(3,\)"),
        (IMAGES, LABELS.astype(float), "integers; got float64"),
        (IMAGES, [0, 0, 1, 1], "integers; got list"),
    ],
)
def test_bad_input_is_one_clear_line(images, labels, message):
    with pytest.raises(InputError, match=message) as caught:
        LabelAgreement(images, labels)
    assert "\n" not in str(caught.value)


def test_accuracy_checks_its_labels_too(digits):
    greys, classes = digits
    images = enlarged(greys[:50], 16)
    agreement = LabelAgreement(images, classes[:50])
    with pytest.raises(InputError, match="one an image"):
        agreement.accuracy(images, classes[:1])
