"""What samples are compared with: training images, a reference file, a folder."""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
import zipfile
from copy import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe_var.arrays import write_npz
from dmoe_var.data.image_sets import ImageArray, ImageFolder, evenly_strided
from dmoe_var.errors import DataError
from dmoe_var.metrics.feature_statistics import Network, Statistics
from dmoe_var.metrics.fidelity import Fidelity, FidelityConfig
from dmoe_var.metrics.image_files import labels_of, open_images
from dmoe_var.metrics.reference import load_reference

CONFIG = FidelityConfig(input_size=32, batch_size=16, reference_images=10)
SIZE = 16


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)


class TrainingImages(ImageArray):
    """A data set: images with a key."""

    key = "set-a"


@pytest.fixture(scope="module")
def network():
    return Fidelity(CONFIG)


@pytest.fixture
def load(network, images, tmp_path):
    """load(**fields of FidelityConfig) -> the reference of 16 px samples."""

    def load(image_size=SIZE, **fields):
        if "reference" in fields:
            fields["reference"] = str(fields["reference"])
        fidelity, cache = copy(network), tmp_path / "cache"
        fidelity.config = replace(CONFIG, **fields)
        return load_reference(fidelity, lambda: TrainingImages(images), image_size, cache)

    return load


@pytest.fixture(scope="module")
def statistics(network, images):
    return network.statistics(images)


def test_training_images(load, statistics):
    reference = load()
    np.testing.assert_array_equal(reference.statistics.mu, statistics.mu)
    assert reference.features_MD is None
    assert reference.about == {"reference": "training images (set-a)", "reference_images": 20}


def test_features_for_precision_and_recall(load, network, images):
    """Of at most reference_images images, evenly strided."""
    reference = load(precision_recall=True)
    expected = network.features(images[::2])
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
            "mu_s": np.zeros(5), "sigma_s": np.eye(5), **asdict(statistics.network), **arrays,
        }  # fmt: skip
        path = tmp_path / "VIRTUAL.npz"
        np.savez(path, **{name: array for name, array in content.items() if array is not None})
        return path

    return adm_file


def test_adm_file(load, adm_file, network, statistics, images):
    """mu and sigma are read; images only where precision and recall are measured."""
    path = adm_file()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fidelity, "_layers", lambda *_: pytest.fail("features are computed"))
        reference = load(reference=path)
    np.testing.assert_array_equal(reference.statistics.sigma, statistics.sigma)
    assert reference.about == {"reference": str(path), "reference_sha256": sha256}
    reference = load(reference=path, precision_recall=True)
    expected = network.features(images[::2])
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
        ({"mu": np.zeros(2048)}, ("mu has shape (2048,)", "expected (1280,)")),
        ({"sigma": np.eye(3)}, ("sigma has shape (3, 3)", "expected (1280, 1280)")),
        ({"mu": np.full(1280, np.inf)}, ("mu", "not finite")),
        ({"arr_0": np.zeros((9, 8, 8, 3), np.uint8)}, ("(9, 8, 8, 3)", "('N', 16, 16, 3)")),
    ],
)
def test_other_files_are_one_line(load, adm_file, arrays, parts):
    path = adm_file(**arrays)
    with pytest.raises(DataError) as caught:
        load(reference=path, precision_recall=True)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in (str(path), *parts) if part not in message] == [], message


@pytest.mark.parametrize(
    ("arr_0", "parts"),
    [
        (np.zeros((9, 3, 16, 16), np.uint8), ("uint8 (9, 3, 16, 16)", "('N', 16, 16, 3)")),
        (np.zeros((9, 16, 16, 3), np.float32), ("float32 (9, 16, 16, 3)", "expected uint8")),
        (np.zeros((9, 32, 32, 3), np.uint8), ("(9, 32, 32, 3)", "data.image_size=16")),
    ],
)
def test_images_of_another_layout(load, tmp_path, arr_0, parts):
    np.savez(tmp_path / "images.npz", arr_0=arr_0)
    with pytest.raises(DataError) as caught:
        load(reference=tmp_path / "images.npz")
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in ("images.npz", *parts) if part not in message] == [], message


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_images_alone(load, network, images, statistics, tmp_path, write):
    """Their statistics, computed once for each content, whatever the file is called."""
    path, about = tmp_path / "samples", np.arange(20)
    with path.open("wb") as file:
        write(file, arr_0=images, labels=about, seeds=about)
    reference = load(reference=path)
    np.testing.assert_array_equal(reference.statistics.mu, statistics.mu)
    np.testing.assert_array_equal(reference.statistics.sigma, statistics.sigma)
    assert reference.about == {
        "reference": str(path),
        "reference_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "reference_images": 20,
    }
    other = path.rename(tmp_path / "other.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fidelity, "_layers", lambda *_: pytest.fail("features are computed"))
        again = load(reference=other)
    np.testing.assert_array_equal(again.statistics.mu, statistics.mu)
    with other.open("r+b") as file:  # in place
        write(file, arr_0=255 - images, labels=about, seeds=about)
    inverted = load(reference=other)
    expected = network.statistics(255 - images)
    np.testing.assert_array_equal(inverted.statistics.mu, expected.mu)


def write_zip(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"content")


def write_tar(path, name):
    (path.parent / name).write_bytes(b"content")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / name, name)


OTHER_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "npy": (lambda path: np.save(path.open("wb"), np.zeros(3)), "np.savez(file, arr_0=array)"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"mu": 0})), "a pickle"),
    "pictures": (lambda path: write_zip(path, "n01/1.JPEG"), "holds n01/1.JPEG"),
    "tar": (lambda path: write_tar(path, "a.png"), "an archive; unpack it"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html>"), "a web page"),
    "git-lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "text": (lambda path: path.write_text("mu"), "no .npz file"),
    "other arrays": (lambda path: np.savez(path.open("wb"), x=0, y=0), "holds x, y"),
    "mu alone": (lambda path: np.savez(path.open("wb"), mu=0), "holds mu"),
    "images, mu": (lambda path: np.savez(path.open("wb"), arr_0=0, mu=0), "holds arr_0, mu"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_what_a_file_is_stands_in_the_line(load, tmp_path, kind):
    """And what is allowed; nothing is unpickled."""
    write, said = OTHER_FILES[kind]
    path = tmp_path / "reference.npz"
    write(path)
    with pytest.raises(DataError) as caught:
        load(reference=path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"fidelity.reference={path}: ")
    assert said in message
    assert "a folder of pictures, or an .npz file" in message


def test_a_file_cut_short_is_named(load, tmp_path):
    write_zip(tmp_path / "reference.npz", "mu.npy")
    os.truncate(tmp_path / "reference.npz", 40)
    with pytest.raises(DataError, match=r"reference\.npz: missing or no readable \.npz file"):
        load(reference=tmp_path / "reference.npz")


# Statistics say what made them


def saved(statistics, path):
    write_npz(path, statistics.arrays)
    return path


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input_size": 48}, ("efflite0 at 32 px", "efflite0 at 48 px")),
        ({"weights_sha256": "f" * 64}, ("with efflite0 at 32 px, weights ffffffffffff",)),
        ({"backbone": "inception"}, ("mu has shape (1280,)", "(2048,), the features of inception")),
    ],
)
def test_statistics_of_another_network_are_refused(statistics, tmp_path, fields, said):
    path = saved(statistics, tmp_path / "ours.npz")
    with pytest.raises(DataError) as caught:
        Statistics.load(path, replace(statistics.network, **fields))
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in (str(path), *said) if part not in message] == [], message


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_statistics_that_name_no_network_are_inceptions(load, adm_file, tmp_path, dtype):
    """Others publish no others: 1,280 features without a name are refused."""
    unsaid = dict.fromkeys(("backbone", "input_size", "weights_sha256"))
    with pytest.raises(DataError, match="a network that the file does not name"):
        load(reference=adm_file(**unsaid))
    path = tmp_path / "pytorch_fid.npz"
    np.savez(path, mu=np.zeros(2048, dtype), sigma=np.eye(2048, dtype=dtype))
    found = Statistics.load(path, Network("inception", 299, "0"))
    assert (found.sigma == np.eye(2048)).all()
    assert found.mu.dtype == np.float64
    assert found.num_images is None


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


def test_folder(load, network, folder, images):
    """Read recursively, in sorted order."""
    order = sorted(range(20), key=lambda i: (i % 3, i))
    found = ImageFolder.open(folder, SIZE)
    assert np.array_equal(found.pixels(torch.arange(20)), images[order])
    reference = load(reference=folder, precision_recall=True)
    expected = network.statistics(images[order])
    np.testing.assert_allclose(reference.statistics.mu, expected.mu, rtol=1e-9)
    assert reference.about["reference_images"] == 20
    assert reference.features_MD.shape == (10, 1280)


def test_folder_key_names_places_and_content(folder):
    key = ImageFolder.open(folder, SIZE).key
    assert ImageFolder.open(folder, SIZE).key == key
    assert ImageFolder.open(folder, 8).key != key
    path = folder / "class_0" / "000.PNG"
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    assert ImageFolder.open(folder, SIZE).key != key
    path.write_bytes(content)
    assert ImageFolder.open(folder, SIZE).key == key
    path.rename(folder / "class_0" / "0000.PNG")
    assert ImageFolder.open(folder, SIZE).key != key


@pytest.fixture
def bmp_folder(tmp_path):
    """bmp_folder(name, images): files of one size, whatever they show; the latest are younger."""

    def bmp_folder(name, images):
        for i, image in enumerate(images):
            path = tmp_path / name / f"class_{i % 2}" / f"{i:02d}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        return tmp_path / name

    return bmp_folder


def test_pictures_of_other_content_have_other_statistics(load, network, bmp_folder, images):
    """Overwritten in place, and where a class is deleted; not where the folder is moved."""
    order, fresh = sorted(range(20), key=lambda i: i % 2), network.statistics
    a = bmp_folder("a", images)
    hashes = {load(reference=a).about["reference_sha256"]}
    times = {path: path.stat() for path in a.rglob("*.bmp")}
    bmp_folder("a", 255 - images)
    for path, before in times.items():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    reference = load(reference=a)
    np.testing.assert_array_equal(reference.statistics.mu, fresh(255 - images[order]).mu)
    hashes.add(reference.about["reference_sha256"])
    for path in (a / "class_1").iterdir():
        path.unlink()
    reference = load(reference=a)
    np.testing.assert_array_equal(reference.statistics.mu, fresh(255 - images[::2]).mu)
    hashes.add(reference.about["reference_sha256"])
    assert len(hashes) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fidelity, "_layers", lambda *_: pytest.fail("features are computed"))
        load(reference=a.rename(a.with_name("moved")))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_reference_that_changes_while_it_is_read(
    load, network, bmp_folder, images, tmp_path, monkeypatch, kind
):
    path, layers = tmp_path / "images.npz", Fidelity._layers
    np.savez(path, arr_0=images)
    path = bmp_folder("a", images) if kind == "folder" else path

    def meanwhile(*given):
        yield from layers(*given)
        if kind == "folder":
            bmp_folder("a", 255 - images)
        else:
            np.savez(path, arr_0=255 - images)

    with monkeypatch.context() as patch:
        patch.setattr(Fidelity, "_layers", meanwhile)
        with pytest.raises(DataError, match="changed while it was read; run again"):
            load(reference=path)
    assert not list((tmp_path / "cache").glob("*.npz"))  # of neither content
    shown = 255 - images[sorted(range(20), key=lambda i: i % 2)]
    expected = network.statistics(shown if kind == "folder" else 255 - images)
    np.testing.assert_array_equal(load(reference=path).statistics.mu, expected.mu)


def test_what_lies_in_a_folder(folder, tmp_path, capsys):
    """Links to folders are followed, hidden files are not there, and others are counted."""
    (folder / "._class").write_bytes(b"a file system's own")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "thumbnail.png").write_bytes(b"broken")
    away = (folder / "class_1").rename(tmp_path / "away")
    (folder / "class_1").symlink_to(away)
    (folder / "class_0" / "up").symlink_to(folder)
    (folder / "class_3").symlink_to(folder / "class_2")
    found = ImageFolder.open(folder, SIZE)
    assert len(found) == 20
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"{folder}: 20 image files, passed over 1 others (README.txt)"


@pytest.mark.parametrize("name", ["labels", "arr_1"])
def test_labels_of_files(tmp_path, images, name):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=images, **{name: np.arange(20, dtype=np.int32)})
    found = open_images("evaluate.samples", path, SIZE, None, images_too=True)
    assert labels_of(found).tolist() == list(range(20))
    np.savez(path, arr_0=images, **{name: np.arange(19)})
    found = open_images("evaluate.samples", path, SIZE, None, images_too=True)
    with pytest.raises(DataError, match=rf"{name} is int64 \(19,\); expected a class for each"):
        labels_of(found)


def test_labels_of_folders(folder, tmp_path):
    def labels():
        return labels_of(open_images("evaluate.samples", folder, SIZE, None, images_too=True))

    assert labels() is None
    for i in range(3):
        (folder / f"class_{i}").rename(folder / str(9 - i))
    assert labels().tolist() == [7] * 6 + [8] * 7 + [9] * 7


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


def test_our_own_statistics_are_a_reference(load, network, statistics, tmp_path):
    path = saved(statistics, tmp_path / "ours.npz")
    np.testing.assert_array_equal(load(reference=path).statistics.mu, statistics.mu)
    assert Statistics.load(path, network.network).num_images == 20
