"""Class folders: which files are taken, in what order, and which label each folder has."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dmoe_var.data import load_data
from dmoe_var.data.class_folders import (
    WNIDS,
    balanced,
    labels_of,
    list_pictures,
    sorted_classes,
)
from dmoe_var.data.config import DataConfig
from dmoe_var.errors import DataError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


NESTED = (
    "b/2.jpg", "b/10.PNG", "b/x.ppm", "b/x.bmp", "b/x.pgm", "b/x.tif", "b/x.TIFF", "b/x.webp",
    "b/x.jpeg", "b/x/1.jpg", "b/x-y/1.jpg", "b/x/y/1.jpg", "b/x/a.jpg", "b/ä.png", "b/Z.png",
    "a/deep/deeper/0.png", "a/notes.txt",
)  # fmt: skip


def test_pictures_are_torchvisions_in_its_order(tmp_path):
    """The library that the published code uses: nested folders, links to folders, all suffixes."""
    touch(tmp_path / "root", *NESTED)
    touch(tmp_path / "elsewhere", "1.png", "within/2.png")
    (tmp_path / "root" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "c").symlink_to(tmp_path / "elsewhere")
    ours = list_pictures(tmp_path / "root").pictures
    theirs = ImageFolder(str(tmp_path / "root"))
    found = [str(tmp_path / "root" / name / path) for name, paths in ours.items() for path in paths]
    assert found == [path for path, _ in theirs.samples]
    assert list(ours) == theirs.classes


def test_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, "cat/1.jpg", "cat/in/2.jpg"))
    assert list_pictures(Path()).pictures == {"cat": ["1.jpg", "in/2.jpg"]}


def test_what_is_passed_over_is_counted_in_one_line(tmp_path):
    touch(tmp_path, "list.jpg", "a/1.jpg", "a/.2.jpg", "a/3.gif", "a/4.GIF", "a/5", ".git/1.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "all").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    listing = list_pictures(tmp_path)
    assert listing.pictures == {"a": ["1.jpg"]}
    assert listing.passed_over == {
        "hidden": 2,
        "outside class folders": 1,
        ".gif": 2,
        "without extension": 1,
        "links to a folder that they are in": 2,
        "no regular file": 1,
    }
    assert listing.line().startswith(f"{tmp_path}: 9 entries passed over (")
    assert "2 .gif" in listing.line()
    assert "\n" not in listing.line()
    assert list_pictures(touch(tmp_path / "b", "a/1.jpg")).line() == ""


def test_links_to_nothing_are_listed(tmp_path):
    """They will be found unreadable, and are no reason to stop."""
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "a" / "self.jpg").symlink_to("self.jpg")
    assert list_pictures(tmp_path).pictures == {"a": ["1.jpg", "gone.jpg", "self.jpg"]}


# Labels


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("10", "9", "0", "1"), ["0", "1", "9", "10"]),
        (("002", "10", "-1"), ["-1", "002", "10"]),
        (("10", "9", "x"), ["10", "9", "x"]),
        (("²", "10", "9"), ["10", "9", "²"]),
    ],
)
def test_whole_numbers_are_sorted_as_numbers(tmp_path, names, expected):
    assert sorted_classes(names, tmp_path) == expected


def test_two_folders_of_one_number(tmp_path):
    touch(tmp_path, "1/a.png", "01/a.png", "2/a.png")
    with pytest.raises(DataError, match=f"{tmp_path}: class folders 01 and 1 are one number"):
        list_pictures(tmp_path)


def test_wnids_are_torchvisions_classes(tmp_path):
    """Sorted and unique; ImageNet folders hold each at the place of torchvision's name for it."""
    assert len(set(WNIDS)) == 1000
    assert sorted(WNIDS) == list(WNIDS)
    known = {"n01440764": 0, "n02123045": 281, "n02510455": 388, "n07753592": 954, "n15075141": 999}
    assert {wnid: WNIDS.index(wnid) for wnid in known} == known


@pytest.mark.parametrize(
    ("names", "num_classes", "expected"),
    [
        (["cats", "dogs"], 2, [0, 1]),
        (["1", "4", "9"], 10, [1, 4, 9]),
        (["01", "04"], 10, [1, 4]),
        (["n02123045", "n15075141"], 1000, [281, 999]),
        (["n02123045", "n15075141"], 2, [0, 1]),
        (["cats", "dogs"], 10, None),
        (["n02123045", "n00000000"], 1000, None),
        (["n02123045", "5"], 1000, None),
        (["1", "10"], 10, None),
        (["0", "1", "2"], 2, None),
    ],
)
def test_labels(names, num_classes, expected):
    assert labels_of(names, num_classes) == expected


@pytest.fixture
def set_of(tmp_path):
    """set_of(*class folders, num_classes=of the model, folders=, **keys of DataConfig) -> training
    and held-out pictures, two a class, which say of which folder they are."""

    def set_of(*names, num_classes=None, folders=None, **fields):
        for part in ("train", "val"):
            for place, name in enumerate(names):
                folder = tmp_path / part / name
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(2):
                    Image.new("L", (8, 8), 20 * place + number).save(folder / f"{number}.png")
        fields = {"image_size": 8, "root": str(tmp_path), "num_classes": folders, **fields}
        config = DataConfig("image_folder", **fields)
        return load_data(config, num_classes)

    return set_of


@pytest.mark.parametrize("folders", [None, 3, 10])
def test_some_of_a_model_s_classes_keep_its_labels(set_of, folders):
    for images in set_of("7", "9", "2", num_classes=10, folders=folders):
        assert images.labels.tolist() == [2, 2, 7, 7, 9, 9]
        assert images.num_classes == 10
        assert images.pixels([0, 2, 4])[:, 0, 0, 0].tolist() == [40, 0, 20]


def test_a_limit_takes_some_of_each(set_of):
    training, held_out = set_of("7", "9", "2", num_classes=10, limit=4, held_out=2)
    assert training.labels.tolist() == [2, 2, 7, 9]
    assert held_out.labels.tolist() == [2, 7]


def test_unknown_labels(set_of):
    said = "train: found 2 class folders, expected var.num_classes=10; .*0..9.*wnids.*num_classes=2"
    with pytest.raises(DataError, match=said):
        set_of("cats", "dogs", num_classes=10)


def test_neither_the_folders_nor_the_model_s_number(set_of):
    with pytest.raises(DataError, match=r"found 2 class folders, expected data.num_classes=5"):
        set_of("1", "2", num_classes=10, folders=5)


def test_labels_are_told_once(set_of, tmp_path, capsys):
    touch(tmp_path / "train", "9/notes.txt")
    for _ in range(2):
        training, _ = set_of("10", "9", num_classes=11)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"{tmp_path}: 2 of 11 classes, folder = label: 9 = 9, 10 = 10"
    assert told[1].startswith(f"{tmp_path}/train: 1 entries passed over (1 .txt)")
    assert len(told) == 2
    about = training.about()
    assert about["classes"] == {"9": 9, "10": 10}
    assert about["passed_over"] == {".txt": 1}
    assert about["content"] == training.key


def test_balanced_keeps_empty_classes_in_place(tmp_path):
    pictures = {"a": ["x"], "b": ["y", "z"]}
    assert balanced(pictures, 1, tmp_path, "data.limit") == {"a": ["x"], "b": []}
    assert np.sum([len(files) for files in balanced(pictures, 3, tmp_path, "k").values()]) == 3
