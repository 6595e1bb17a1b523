"""Many images: batches, labels and files must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmoe_var import DynamicVAR, Threshold, generate
from dmoe_var.errors import DataError
from dmoe_var.sampling.draw import Samples, balanced_labels, draw_samples
from dmoe_var.sampling.sampler import SamplingConfig

SAMPLING = {"cfg": 2.0, "top_k": 20, "top_p": 0.9}
LABELS = np.array([0, 1, 2, 3, 4, 2, 2])


@pytest.fixture(scope="module")
def models(make_var, make_moe, make_vqvae):
    dynamic = DynamicVAR(make_var(seed=0), make_moe(make_var(seed=1, activation="relu")), (2, 3))
    return dynamic, make_vqvae()


def drawn(models, batch_size):
    sampling = SamplingConfig(batch_size=batch_size, **SAMPLING)
    return draw_samples(*models, LABELS, 5, sampling, selection=Threshold(0.3))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_images_are_the_samplers_whatever_the_batch(models, batch_size):
    samples, counts = drawn(models, batch_size)
    images = generate(*models, torch.from_numpy(LABELS), seed=5, tau=0.3, **SAMPLING)
    expected = (images * 255).permute(0, 2, 3, 1).numpy()
    assert samples.images.dtype == np.uint8
    assert np.abs(samples.images - expected).max() < 0.51  # rounded, not cut off
    assert np.array_equal(samples.labels, LABELS)
    assert samples.seeds.tolist() == [5] * len(LABELS)
    assert len(counts) == -(-len(LABELS) // batch_size)
    assert sum(c.per_token(3).shape[1] for c in counts) == 2 * len(LABELS)


def test_one_image_can_be_drawn_again(models):
    samples, _ = drawn(models, 4)
    again = generate(*models, [4], seed=5, start_index=4, tau=0.3, **SAMPLING)
    assert np.abs(samples.images[4] - (again[0] * 255).permute(1, 2, 0).numpy()).max() < 0.51


@pytest.mark.parametrize("num_samples", [10, 13])
def test_labels_are_balanced(num_samples):
    counts = np.bincount(balanced_labels(num_samples, 5), minlength=5)
    assert counts.sum() == num_samples
    assert counts.max() - counts.min() <= 1


def test_files_keep_everything(models, tmp_path):
    samples, _ = drawn(models, 7)
    samples.save(tmp_path / "new" / "samples.npz")
    loaded = Samples.load(tmp_path / "new" / "samples.npz")
    assert np.array_equal(loaded.images, samples.images)
    assert np.array_equal(loaded.labels, samples.labels)
    assert np.array_equal(loaded.seeds, samples.seeds)
    with np.load(tmp_path / "new" / "samples.npz") as file:  # as the ADM evaluator reads it
        assert np.array_equal(file["arr_0"], samples.images)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.npz"]


@pytest.mark.parametrize("left", [None, 0, 10, 200, -1], ids=str)
def test_broken_files_are_one_line(tmp_path, left):
    path = tmp_path / "samples.npz"
    if left is not None:
        Samples(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), np.arange(2)).save(path)
        path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=str(path)) as caught:
        Samples.load(path)
    assert "\n" not in str(caught.value)
