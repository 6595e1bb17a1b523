"""Points of a curve and pictures, on the tiny experiment (its distance is a fake, see conftest)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dmoe_var.data.digits import ImageSet
from dmoe_var.metrics.images import to_uint8
from dmoe_var.metrics.record import Record
from dmoe_var.moe.layer import ExpertCounts
from dmoe_var.sampling.sampler import generate
from dmoe_var.stages import models
from dmoe_var.stages.evaluate import Bench, describe
from dmoe_var.stages.graph import run_stage
from dmoe_var.stages.pictures import collect_maps


def test_a_point(make_work, runs):
    """Its samples lie beside its record, and any of them can be drawn again from it."""
    work = make_work(runs, {"selection.tau": [0.3, 0.6], "evaluate.seed": 4})
    record = run_stage(work, "evaluate")
    assert record.num_samples == 20
    assert record.about == {"samples": "samples.npz", "fidelity": "fid_fake"}
    assert 0 <= record.metrics["label_agreement"] <= 1
    assert 0 < record.metrics["experts_share_scale3"] < 1
    with np.load(work.folder("evaluate") / "samples.npz") as samples:
        images, labels, seeds = (samples[name] for name in ("arr_0", "labels", "seeds"))
    assert images.shape == (20, 8, 8, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [*range(10)] * 2
    assert seeds.tolist() == [4] * 20
    again = generate(
        models.dynamic(work), models.vqvae(work), [int(labels[13])],
        seed=4, start_index=13, tau=[0.3, 0.6],
    )  # fmt: skip
    difference = again[0].permute(1, 2, 0).numpy() * 255 - images[13]
    assert np.abs(difference).max() < 0.51


def test_dense_and_dynamic_points_differ(make_work, runs, images_of):
    dense = make_work(runs, {"evaluate.model": "dense"})
    dynamic = make_work(runs)
    metrics = [run_stage(work, "evaluate").metrics for work in (dense, dynamic)]
    assert not any(name.startswith("experts_share") for name in metrics[0])
    images = [images_of(work.folder("evaluate") / "samples.npz") for work in (dense, dynamic)]
    assert not np.array_equal(*images)


def test_the_reference_is_the_training_set(make_work, runs):
    bench = Bench(make_work(runs))
    assert isinstance(bench.training_images, ImageSet)
    assert bench.training_images.key.startswith("digits-train-8")
    assert bench.reference == bench.training_images.images.mean()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"evaluate.model": "dense"}, "dense seed 0"),
        ({"selection.tau": [0.25, 0.5]}, "threshold 0.25,0.5 at scales 2,3 seed 0"),
        ({"selection.rule": "top_k", "evaluate.seed": 2}, "top_k 8 at scales 2,3 seed 2"),
        ({"selection.rule": "cumulative"}, "cumulative 0.9 at scales 2,3 seed 0"),
        ({"selection.rule": "all", "moe.scales": [1]}, "all  at scales 1 seed 0"),
    ],
)
def test_description(make_work, changes, text):
    if changes.get("selection.rule") == "top_k":
        changes = {**changes, "selection.k": 4}
        text = text.replace("top_k 8", "top_k 4")
    assert describe(make_work(changes=changes)) == text


def test_sample_stage(make_work, runs, images_of):
    """Chosen classes, dense beside dynamic from the same seeds."""
    changes = {"sample.classes": [7, 3], "sample.per_class": 2, "sample.single_pngs": True}
    work = make_work(runs, {**changes, "selection.tau": 1.0})
    record = run_stage(work, "sample")
    assert record.num_samples == 4
    folder = work.folder("sample")
    grids = [images_of(folder / name / "samples.npz") for name in ("dense", "dynamic")]
    assert not np.array_equal(*grids)
    assert np.load(folder / "dense" / "samples.npz")["labels"].tolist() == [7, 3, 7, 3]
    for images, name in zip(grids, ("dense", "dynamic"), strict=True):
        singles = sorted((folder / name).glob("*.png"))
        assert [p.stem.rpartition("class")[2] for p in singles] == ["7", "3", "7", "3"]
        assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in singles]), images)
    assert Image.open(folder / "grid.png").format == "PNG"


@pytest.mark.parametrize("tau", [[0.0, 0.0], [0.4, 0.8]])
def test_expert_maps(make_work, runs, tau):
    """Shares of the four experts, for the class that was asked for (the first rows of the
    sampler's batch), each scale's cells enlarged to the finest scale's four."""
    work, labels, counts = make_work(runs), [3, 5, 6], ExpertCounts()
    images, maps = collect_maps(work, Bench(work), labels, tau, seed=1)
    assert images.shape == (3, 2, 8, 8, 3)
    assert maps.shape == (3, 2, 4, 4)
    model, vqvae = models.dynamic(work), models.vqvae(work)
    drawn = generate(model, vqvae, labels, seed=1, tau=tau, counts=counts)
    assert np.array_equal(images[:, 1], to_uint8(drawn))
    for i, (si, cells) in enumerate(((2, [0, 0, 1, 2]), (3, [0, 1, 2, 3]))):
        side = work.config.var.patch_nums[si]
        share = counts.per_token(si)[0, :3].view(3, side, side).numpy() / 4
        assert np.array_equal(maps[:, i], share[:, cells][:, :, cells])
        assert (maps[:, i] == 1).all() == (tau == [0.0, 0.0])


def test_records_of_points_are_whole(make_work, runs):
    """Sampling time and every FLOP part are numbers with their unit in the name."""
    metrics = run_stage(make_work(runs), "evaluate").metrics
    stored = Record.read(make_work(runs).folder("evaluate") / "result.json").metrics
    assert stored == metrics
    assert {"flops_gmac", "flops_gmac_std", "sampling_ms_per_image", "fid_fake"} <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
