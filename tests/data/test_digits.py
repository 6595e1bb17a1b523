"""The digits: the same split for everyone, real pixels, enlarged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from sklearn.datasets import load_digits as sklearn_digits

from dmoe_var.data import load_data
from dmoe_var.data.config import DataConfig
from dmoe_var.data.digits import load_digits


@pytest.fixture(scope="module")
def sets():
    return load_digits(16)


def test_types_and_sizes(sets):
    for images, number in zip(sets, (1437, 360), strict=True):
        assert images.images.shape == (number, 16, 16, 3)
        assert images.images.dtype == np.uint8
        assert images.labels.dtype == np.int64
        assert (len(images), images.num_classes) == (number, 10)
        assert (images.images == images.images[..., :1]).all()


def test_split_is_disjoint_and_complete():
    """Every one of the (distinct) originals is in one set, with its label."""
    greys, labels = sklearn_digits(return_X_y=True)
    originals = sorted((tuple(grey), label) for grey, label in zip(greys, labels, strict=True))
    assert len(set(originals)) == len(originals)
    ours = [
        (tuple((image[..., 0] / 255 * 16).round().ravel()), label)
        for images in load_digits(8)
        for image, label in zip(images.images, images.labels, strict=True)
    ]
    assert sorted(ours) == originals


def test_split_is_stratified(sets):
    shares = [np.bincount(s.labels, minlength=10) / len(s) for s in sets]
    assert np.abs(shares[0] - shares[1]).max() < 0.005


def test_split_is_fixed(sets):
    """Pinned: another split would make all records of other runs incomparable."""
    for ours, again in zip(sets, load_digits(16), strict=True):
        assert np.array_equal(ours.images, again.images)
        assert ours.key == again.key
    assert sets[0].labels[:12].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8, 3, 5]
    assert sets[1].labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_tensors_lie_in_minus_one_to_one(sets):
    indices = torch.tensor([5, 0])
    x_B3RR = sets[0].tensors(indices)
    assert x_B3RR.dtype == torch.float32
    pixels = torch.from_numpy(sets[0].images[[5, 0]]).permute(0, 3, 1, 2).double()
    torch.testing.assert_close(x_B3RR.double(), pixels / 255 * 2 - 1, atol=1e-6, rtol=0)
    assert (x_B3RR.min(), x_B3RR.max()) == (-1, 1)


def test_configuration():
    assert load_data(DataConfig(image_size=8))[0].key == load_digits(8)[0].key
    for wrong in ({"kind": "mnist"}, {"image_size": 12}, {"image_size": 0}, {"size": 16}):
        with pytest.raises(ValidationError):
            TypeAdapter(DataConfig).validate_python(wrong)
