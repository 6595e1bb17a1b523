"""Many images: batches, labels and files must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmoe_var import Threshold, count_flops, generate
from dmoe_var.arrays import write_npz
from dmoe_var.errors import DataError
from dmoe_var.moe.counts import ExpertHistogram
from dmoe_var.sampling.draw import Drawing, Samples, balanced_labels
from dmoe_var.sampling.sampler import SamplingConfig

SAMPLING = {"cfg": 2.0, "top_k": 20, "top_p": 0.9}
LABELS = np.array([0, 1, 2, 3, 4, 2, 2])


def drawing_of(models, batch_size, **options):
    sampling = SamplingConfig(batch_size=batch_size, **{**SAMPLING, **options})
    return Drawing(*models, LABELS, 5, sampling, Threshold(0.3))


@pytest.mark.parametrize("batch_size", [3, 100])
def test_images_are_the_samplers_whatever_the_batch(tiny_models, batch_size):
    drawing = drawing_of(tiny_models, batch_size)
    assert drawing.num_batches == -(-len(LABELS) // batch_size)
    batches = [drawing.batch(i).samples for i in range(drawing.num_batches)]
    images = generate(*tiny_models, torch.from_numpy(LABELS), seed=5, tau=0.3, **SAMPLING)
    expected = (images * 255).permute(0, 2, 3, 1).numpy()
    drawn = np.concatenate([batch.images for batch in batches])
    assert drawn.dtype == np.uint8
    assert drawn.shape[1] == drawing.image_size
    assert np.abs(drawn - expected).max() < 0.51  # rounded, not cut off
    assert np.concatenate([batch.labels for batch in batches]).tolist() == LABELS.tolist()
    assert np.concatenate([batch.seeds for batch in batches]).tolist() == [5] * len(LABELS)


@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_experts_are_counted_by_image(tiny_models, cfg):
    """The same as what `count_flops` finds, with and without the unconditional rows."""
    drawing = drawing_of(tiny_models, 3, cfg=cfg)
    batches = [drawing.batch(i) for i in range(drawing.num_batches)]
    counted = count_flops(*tiny_models, LABELS, seed=5, tau=0.3, **{**SAMPLING, "cfg": cfg})
    assert ExpertHistogram.joined(batch.ran for batch in batches) == counted.ran
    assert all(batch.seconds > 0 for batch in batches)


def test_without_a_rule_nothing_is_counted(tiny_models):
    sampling = SamplingConfig(batch_size=4, **SAMPLING)
    assert Drawing(*tiny_models, LABELS, 5, sampling).batch(0).ran == ExpertHistogram.none(4)


def test_one_image_can_be_drawn_again(tiny_models):
    images = drawing_of(tiny_models, 3).batch(1).samples.images
    again = generate(*tiny_models, [4], seed=5, start_index=4, tau=0.3, **SAMPLING)
    assert np.abs(images[1] - (again[0] * 255).permute(1, 2, 0).numpy()).max() < 0.51


@pytest.mark.parametrize(("num_samples", "num_classes"), [(500, 1000), (3, 10), (1, 7)])
def test_few_images_lie_over_all_classes(num_samples, num_classes):
    """No class twice, and the classes left out between two neighbours as many but for one."""
    labels = balanced_labels(num_samples, num_classes)
    assert labels.dtype == np.int64
    steps = np.diff([*labels, num_classes])
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1
    assert labels[0] == 0


def test_classes_come_in_turn():
    assert balanced_labels(25, 10).tolist() == [i % 10 for i in range(25)]


STORED = {
    "arr_0": np.arange(384, dtype=np.int64).reshape(2, 8, 8, 3).astype(np.uint8),
    "labels": np.array([3, 1]),
    "seeds": np.array([7, 7]),
}


def test_stored_samples_stay_on_the_disk(tmp_path):
    write_npz(tmp_path / "samples.npz", STORED)
    samples = Samples.load(tmp_path / "samples.npz")
    assert isinstance(samples.images, np.memmap)
    for found, stored in zip(vars(samples).values(), STORED.values(), strict=True):
        assert np.array_equal(found, stored)


@pytest.mark.parametrize(
    "changes", [{"arr_0": np.zeros((2, 8, 8, 3))}, {"labels": np.arange(3)}, {"arr_0": np.eye(2)}]
)
def test_other_files_are_refused(tmp_path, changes):
    write_npz(tmp_path / "samples.npz", {**STORED, **changes})
    with pytest.raises(DataError, match=r"samples\.npz: expected images"):
        Samples.load(tmp_path / "samples.npz")
