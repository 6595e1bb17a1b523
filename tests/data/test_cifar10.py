"""CIFAR-10 in torchvision's layout, of which a tiny fake lies in a folder."""

from __future__ import annotations

import hashlib
import pickle
import urllib.error

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from dmoe_var.data import load_data
from dmoe_var.data.cifar10 import CLASS_NAMES
from dmoe_var.data.class_names import class_index, class_names
from dmoe_var.data.config import DataConfig
from dmoe_var.errors import DataError

PER_FILE = 30


def write(path, content):
    """Pickle a file; return its MD5 sum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(folder) -> the pixels (N, 32, 32, 3) and labels (N,) of the training and test files that
    it writes there, whose sums torchvision is told."""

    def fake(folder):
        rng, sets = np.random.default_rng(0), []
        for part in ("train_list", "test_list"):
            files, pixels, labels = [], [], []
            for name, _ in getattr(CIFAR10, part):
                rows = rng.integers(0, 256, (PER_FILE, 3 * 32 * 32), dtype=np.uint8)
                classes = rng.permutation(np.arange(PER_FILE) % 10)
                path = folder / CIFAR10.base_folder / name
                files.append([name, write(path, {"data": rows, "labels": classes.tolist()})])
                pixels.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels.append(classes)
            monkeypatch.setattr(CIFAR10, part, files)
            sets.append((np.concatenate(pixels), np.concatenate(labels)))
        names = folder / CIFAR10.base_folder / CIFAR10.meta["filename"]
        meta = {**CIFAR10.meta, "md5": write(names, {"label_names": list(CLASS_NAMES)})}
        monkeypatch.setattr(CIFAR10, "meta", meta)
        return sets

    return fake


@pytest.fixture
def loaded(fake, tmp_path):
    """loaded(**keys of DataConfig) -> training and held-out images of the fake."""
    written = fake(tmp_path)

    def loaded(**keys):
        return load_data(DataConfig("cifar10", 32, root=str(tmp_path), **keys))

    loaded.written = written
    return loaded


def test_pixels_and_labels_are_those_of_the_files(loaded):
    for images, (pixels, labels) in zip(loaded(), loaded.written, strict=True):
        assert np.array_equal(images.pixels(np.arange(len(images))), pixels)
        assert np.array_equal(images.labels, labels)
        assert (images.images.dtype, images.labels.dtype) == (np.uint8, np.int64)
        assert images.images.flags.c_contiguous
        assert images.num_classes == 10
    assert [len(images) for images in loaded()] == [5 * PER_FILE, PER_FILE]


def test_limits_take_the_first_of_each_class_in_turns(loaded):
    """In the order of the files, and 23 of ten classes: three of the first three, two of others."""
    for number, images, (pixels, labels) in zip(
        (23, 10), loaded(limit=23, held_out=10), loaded.written, strict=True
    ):
        turns = [int((labels[:i] == label).sum()) for i, label in enumerate(labels)]
        first = sorted(range(len(labels)), key=lambda i: (turns[i], labels[i]))[:number]
        assert np.array_equal(images.images, pixels[sorted(first)])
        assert np.array_equal(images.labels, labels[sorted(first)])
    with pytest.raises(DataError, match=r"holds 30 test pictures, data.held_out=31 asks for more"):
        loaded(held_out=31)


def test_every_second_augmentation_is_mirrored(loaded):
    """Of the training pictures that `limit` leaves, one after the other."""
    plain, _ = loaded(limit=20)
    augmented, held_out = loaded(limit=20, augmentations=3, flip=True)
    views = augmented.images.reshape(20, 3, 32, 32, 3)
    for view in (0, 2):
        assert np.array_equal(views[:, view], plain.images)
    assert np.array_equal(views[:, 1], plain.images[:, :, ::-1])
    assert np.array_equal(augmented.labels, np.repeat(plain.labels, 3))
    assert held_out.key == loaded()[1].key
    assert loaded(limit=20, augmentations=3)[0].key not in (plain.key, augmented.key)
    with pytest.raises(ValueError, match="flip=true needs augmentations of 2 or more"):
        loaded(flip=True)


def test_other_pixels_or_labels_have_another_key(loaded, fake, tmp_path, monkeypatch):
    keys = [images.key for images in (*loaded(), *loaded(limit=149, held_out=29))]
    assert len(set(keys)) == 4
    assert [images.key for images in loaded()] == keys[:2]
    name, _ = CIFAR10.train_list[0]
    path = tmp_path / CIFAR10.base_folder / name
    for change in ("labels", "data"):
        content = pickle.loads(path.read_bytes())
        content[change] = content[change][::-1]
        monkeypatch.setattr(
            CIFAR10, "train_list", [[name, write(path, content)], *CIFAR10.train_list[1:]]
        )
        keys.append(loaded()[0].key)
    assert len(set(keys)) == 6


def test_class_folders_have_the_same_labels(loaded, tmp_path):
    """Of the same class names, in whatever order the folders were made."""
    of_class = dict(zip(CLASS_NAMES, range(10), strict=True))
    for name in reversed(CLASS_NAMES):
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            colour = (of_class[name], 0, 0)
            Image.new("RGB", (32, 32), colour).save(tmp_path / part / name / "0.png")
    folders, _ = load_data(DataConfig("image_folder", 32, root=str(tmp_path), resize_ratio=1))
    assert folders.classes == of_class
    assert folders.pixels(range(10))[:, 0, 0, 0].tolist() == folders.labels.tolist()
    assert {CLASS_NAMES[label] for label in loaded()[0].labels} == set(CLASS_NAMES)
    data = DataConfig("cifar10", 32)
    assert class_names(data, 10) == CLASS_NAMES
    assert class_index("Cat", data, 10, "sample.classes") == of_class["cat"]


def fetched(monkeypatch, error=None, fake=None):
    """Stand in for the download; return the folders that it is asked for."""
    asked = []

    def download(url, root, **_):
        asked.append(root)
        if error is not None:
            raise error
        fake(root)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    return asked


def test_what_is_missing_is_downloaded_once(fake, tmp_path, monkeypatch):
    """Without a root into the cache folder."""
    monkeypatch.setenv("DMOE_VAR_CACHE", str(tmp_path / "cache"))
    asked = fetched(monkeypatch, fake=fake)
    with pytest.raises(DataError, match=r"cache: holds no whole cifar-10-batches-py$"):
        load_data(DataConfig("cifar10", 32), fetch=False)
    assert asked == []
    for _ in range(2):
        assert len(load_data(DataConfig("cifar10", 32))[0]) == 5 * PER_FILE
    assert asked == [tmp_path / "cache"]


@pytest.mark.parametrize("damaged", [False, True])
def test_without_a_network_one_line_says_what_helps(fake, tmp_path, monkeypatch, damaged):
    """A file whose sum is wrong counts as missing, and is not unpickled."""
    if damaged:
        fake(tmp_path)
        (tmp_path / CIFAR10.base_folder / CIFAR10.train_list[2][0]).write_bytes(b"no pickle")
    fetched(monkeypatch, urllib.error.URLError("no\nroute"))
    with pytest.raises(DataError) as caught:
        load_data(DataConfig("cifar10", 32, root=str(tmp_path)))
    message = str(caught.value)
    parts = ("data.kind=cifar10", str(tmp_path), "data_batch_5, test_batch, batches.meta", "route",
             "data.kind=image_folder")  # fmt: skip
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message
