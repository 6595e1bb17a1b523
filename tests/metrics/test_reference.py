"""What samples are compared with: training images, a reference file, a folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe_var.errors import DataError, InputError
from dmoe_var.metrics.fidelity import Fidelity, FidelityConfig, Statistics
from dmoe_var.metrics.image_sets import ImageArray, ImageFolder, as_pixels, evenly_strided
from dmoe_var.metrics.reference import load_reference

CONFIG = FidelityConfig(input_size=32, batch_size=16, reference_images=10)
SIZE = 16


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)


class TrainingImages(ImageArray):
    """A data set: images with a key."""

    key = "set-a"


@pytest.fixture
def load(images, tmp_path):
    """load(**fields of FidelityConfig) -> the reference of 16 px samples."""

    def load(image_size=SIZE, **fields):
        if "reference" in fields:
            fields["reference"] = str(fields["reference"])
        fidelity = Fidelity(replace(CONFIG, **fields))
        cache = tmp_path / "cache"
        return load_reference(fidelity, lambda: TrainingImages(images), image_size, cache)

    return load


@pytest.fixture(scope="module")
def statistics(images):
    return Fidelity(CONFIG).statistics(images)


def test_training_images(load, statistics):
    reference = load()
    np.testing.assert_array_equal(reference.statistics.mu, statistics.mu)
    assert reference.features_MD is None
    assert reference.about == {"reference": "training images (set-a)", "reference_images": 20}


def test_features_for_precision_and_recall(load, images):
    """Of at most reference_images images, evenly strided."""
    reference = load(precision_recall=True)
    expected = Fidelity(CONFIG).features(images[::2])
    np.testing.assert_allclose(reference.features_MD, expected, rtol=1e-3, atol=1e-5)
    said = "3 nearest neighbours, 10 reference images"
    assert reference.about["precision_recall"] == said
    with pytest.raises(DataError, match=r"10 images; .*neighbours=10 need more than 10"):
        load(precision_recall=True, neighbours=10)


@pytest.fixture
def adm_file(statistics, images, tmp_path):
    """adm_file(**arrays) -> path of a reference file with arrays put in, or (None) left out."""

    def adm_file(**arrays):
        content = {
            "arr_0": images, "mu": statistics.mu, "sigma": statistics.sigma,
            "mu_s": np.zeros(5), "sigma_s": np.eye(5), **arrays,
        }  # fmt: skip
        path = tmp_path / "VIRTUAL.npz"
        np.savez(path, **{name: array for name, array in content.items() if array is not None})
        return path

    return adm_file


def test_adm_file(load, adm_file, statistics, images):
    """mu and sigma are read; images only where precision and recall are measured."""
    path = adm_file()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fidelity, "_layers", lambda *_: pytest.fail("features are computed"))
        reference = load(reference=path)
    np.testing.assert_array_equal(reference.statistics.sigma, statistics.sigma)
    assert reference.about == {"reference": str(path), "reference_sha256": sha256}
    reference = load(reference=path, precision_recall=True)
    expected = Fidelity(CONFIG).features(images[::2])
    np.testing.assert_allclose(reference.features_MD, expected, rtol=1e-3, atol=1e-5)
    assert reference.about["precision_recall"].endswith("10 reference images")


def test_adm_file_without_images(load, adm_file):
    """Precision and recall are left out, and the record says why."""
    reference = load(reference=adm_file(arr_0=None), precision_recall=True)
    assert reference.features_MD is None
    assert "VIRTUAL.npz holds no images (arr_0)" in reference.about["precision_recall"]


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"mu": None}, ("mu",)),
        ({"sigma": None}, ("sigma",)),
        ({"mu": np.zeros(2048)}, ("mu has shape (2048,)", "expected (1280,)")),
        ({"sigma": np.eye(3)}, ("sigma has shape (3, 3)", "expected (1280, 1280)")),
        ({"mu": np.full(1280, np.inf)}, ("mu", "not finite")),
        ({"arr_0": np.zeros((9, 8, 8, 3), np.uint8)}, ("(9, 8, 8, 3)", "('N', 16, 16, 3)")),
        ({"arr_0": np.zeros((9, 16, 16, 3))}, ("float64", "expected uint8")),
    ],
)
def test_other_files_are_one_line(load, adm_file, arrays, parts):
    path = adm_file(**arrays)
    with pytest.raises(DataError) as caught:
        load(reference=path, precision_recall=True)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in (str(path), *parts) if part not in message] == [], message


def test_a_reference_that_is_not_there(load, tmp_path):
    with pytest.raises(DataError, match=r"fidelity.reference=.*gone.npz: no such"):
        load(reference=tmp_path / "gone.npz")


@pytest.fixture
def folder(images, tmp_path):
    """The images as PNG files in subfolders, beside what is none."""
    folder = tmp_path / "pictures"
    for i, image in enumerate(images):
        path = folder / f"class_{i % 3}" / f"{i:03d}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, format="PNG")
    (folder / "README.txt").write_text("no image")
    return folder


def test_folder(load, folder, images):
    """Read recursively, in sorted order."""
    order = sorted(range(20), key=lambda i: (i % 3, i))
    found = ImageFolder.open(folder, SIZE)
    assert np.array_equal(found.pixels(torch.arange(20)), images[order])
    reference = load(reference=folder, precision_recall=True)
    expected = Fidelity(CONFIG).statistics(images[order])
    np.testing.assert_allclose(reference.statistics.mu, expected.mu, rtol=1e-9)
    assert reference.about["reference_images"] == 20
    assert reference.features_MD.shape == (10, 1280)


def test_folder_key_names_places_and_sizes(folder):
    key = ImageFolder.open(folder, SIZE).key
    assert ImageFolder.open(folder, SIZE).key == key
    path = folder / "class_0" / "000.PNG"
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    assert ImageFolder.open(folder, SIZE).key != key
    path.write_bytes(content)
    assert ImageFolder.open(folder, SIZE).key == key
    path.rename(folder / "class_0" / "0000.PNG")
    assert ImageFolder.open(folder, SIZE).key != key


def test_folder_pictures_of_another_size_or_kind(load, folder, images, tmp_path):
    with pytest.raises(DataError, match=r"000\.PNG: 16 x 16 pixels; expected 32 x 32"):
        load(image_size=32, reference=folder)
    grey = folder / "class_1" / "grey.jpg"
    Image.fromarray(images[0, ..., 0]).save(grey)
    last = ImageFolder.open(folder, SIZE)
    pixels = last.pixels(torch.tensor([last.files.index(grey)]))
    assert pixels.shape == (1, SIZE, SIZE, 3)
    grey.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"grey\.jpg: no readable image") as caught:
        load(reference=folder)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image files"):
        load(reference=tmp_path / "empty")


@pytest.mark.parametrize(("num_images", "most"), [(10, 4), (4, 10), (1_281_167, 10_000), (7, 7)])
def test_strides_are_even(num_images, most):
    indices = evenly_strided(num_images, most)
    steps = set(indices.diff().tolist())
    assert len(indices) == min(num_images, most)
    assert indices[0] == 0
    assert max(steps) - min(steps) <= 1
    assert min(steps) >= 1
    assert num_images - max(steps) <= indices[-1] < num_images


def test_arrays_are_sets_too(images):
    assert np.array_equal(as_pixels(images).pixels(torch.tensor([3, 1])), images[[3, 1]])
    assert as_pixels(ImageArray(images), at_least=20) is not None
    with pytest.raises(InputError, match="at least 21 images"):
        as_pixels(ImageArray(images), at_least=21)


def test_our_own_statistics_are_a_reference(load, statistics, tmp_path):
    statistics.save(tmp_path / "ours.npz")
    reference = load(reference=tmp_path / "ours.npz")
    np.testing.assert_array_equal(reference.statistics.mu, statistics.mu)
    assert Statistics.load(tmp_path / "ours.npz").num_images == 20
