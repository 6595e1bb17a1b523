"""Folders of pictures: which, in what order, cut as published, and what is told of broken ones."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from checking import assert_refused
from PIL import Image

from dmoe_var.data import load_data
from dmoe_var.data.config import DataConfig
from dmoe_var.data.image_folder import WIDEST, Cut
from dmoe_var.errors import ConfigError, DataError

CENTRE = Cut(image_size=32, resize_ratio=1.125, random=False, augmentations=1, seed=0)
RANDOM = replace(CENTRE, random=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_folder):
    """Three classes of 2, 1 and 3 training pictures, and 2, 4 and 1 held-out ones."""
    return make_folder(tmp_path_factory.mktemp("pictures"), train=(2, 1, 3), val=(2, 4, 1))


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def rgb(path):
    return Image.open(path).convert("RGB")


def noise(seed, width, height, channels):
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# The published transform


def by_hand(path, size=36, side=32):
    """The published transform in exact arithmetic: shorter side to `size`, the centre of `side`."""
    picture = rgb(path)
    shorter = min(picture.size)
    width, height = (int(Fraction(size * pixels, shorter)) for pixels in picture.size)
    resized = np.asarray(picture.resize((width, height), Image.LANCZOS))
    top, left = (round(Fraction(pixels - side, 2)) for pixels in (height, width))
    return resized[top : top + side, left : left + side]


def saved_as(kind, path):
    """A picture of an unusual kind (test_pictures.py has more of them)."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned: the published transform does not turn it
    pictures = {
        "tall.png": lambda: Image.fromarray(noise(1, 41, 97, 3)).save(path),
        "small.webp": lambda: Image.fromarray(noise(3, 20, 9, 3)).save(path),
        "cmyk.jpg": lambda: Image.fromarray(noise(6, 50, 41, 4), "CMYK").save(path),
        "turned.jpg": lambda: Image.fromarray(noise(9, 50, 41, 3)).save(path, exif=exif),
    }
    pictures[kind]()


@pytest.mark.filterwarnings("ignore:'mode' parameter")
@pytest.mark.parametrize("kind", ["tall.png", "small.webp", "cmyk.jpg", "turned.jpg"])
def test_centre_crop_is_the_published_one(tmp_path, kind):
    saved_as(kind, tmp_path / kind)
    ours = CENTRE.cropped(CENTRE.opened(tmp_path / kind), 0, 0)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, by_hand(tmp_path / kind))


def test_centre_crop_is_torchvisions(tmp_path):
    """The library that the published code uses, on sides that leave odd and even rests."""
    from torchvision import transforms

    published = transforms.Compose(
        [
            transforms.Resize(36, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop((32, 32)),
        ]
    )
    for seed, size in enumerate([(41, 97), (97, 41), (50, 51), (36, 37), (36, 39), (9, 20)]):
        path = tmp_path / "p.png"
        Image.fromarray(noise(seed, *size, 3)).save(path)
        ours = CENTRE.cropped(CENTRE.opened(path), 0, 0)
        assert np.array_equal(ours, np.asarray(published(rgb(path)))), size


def coordinates(width, height):
    """A picture whose pixels say where they are."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def places(cut, picture, drawn):
    """(left, top) of crops that are whole squares of the picture."""
    for index, augmentation in drawn:
        crop = cut.cropped(picture, index, augmentation).astype(int)
        left, top = crop[0, 0, :2]
        expected = np.asarray(picture)[top : top + 32, left : left + 32]
        assert np.array_equal(crop, expected)
        yield int(left), int(top)


def test_random_crops_are_uniform():
    """All 5 x 8 places, about as often; chi-square with 39 degrees of freedom stays below 85
    in all but 3 of 100,000 cases (the draws are fixed, so this one does or does not)."""
    drawn = [(index, k) for index in range(500) for k in range(8)]
    counts = Counter(places(RANDOM, coordinates(36, 39), drawn))
    assert set(counts) == {(left, top) for left in range(5) for top in range(8)}
    expected = len(drawn) / 40
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 85


def test_a_crop_follows_from_seed_picture_and_augmentation():
    picture = coordinates(180, 180)
    drawn = [(index, k) for index in range(4) for k in range(4)]
    first = list(places(RANDOM, picture, drawn))
    assert len(set(first)) > 12
    assert list(places(RANDOM, picture, drawn[::-1])) == first[::-1]
    assert list(places(replace(RANDOM, seed=1), picture, drawn)) != first


def test_images_are_crops_of_their_pictures(root, folder_images):
    training, held_out = folder_images(root, augmentations=3, seed=5)
    assert (len(training), len(held_out)) == (18, 7)
    for index, pixels in enumerate(training.pixels(torch.arange(18))):
        path = training.path(index)
        assert path == root / "train" / "abc"[training.labels[index]] / path.name
        picture, k = training.cut.opened(path), index % 3
        assert np.array_equal(pixels, training.cut.cropped(picture, index // 3, k))
    ours = held_out.pixels(torch.tensor([4]))[0]
    assert np.array_equal(ours, by_hand(root / "val" / "b" / "02.png", 9, 8))
    assert len({pixels.tobytes() for pixels in training.pixels(np.arange(18))}) > 12


def test_neither_batches_nor_threads_matter(root, folder_images):
    whole = folder_images(root, augmentations=2)[0].pixels(torch.arange(12))
    images = folder_images(root, augmentations=2, workers=3)[0]
    order = torch.tensor([11, 0, 5, 4, 4])
    assert np.array_equal(images.pixels(order), whole[order.numpy()])
    assert np.array_equal(images.decode(range(3, 9)).pixels_BRR3, whole[3:9])
    assert images.pixels(torch.arange(0)).shape == (0, 8, 8, 3)


def test_every_second_augmentation_is_mirrored(root, folder_images):
    plain, held_out = folder_images(root, augmentations=4)
    flipped, same = folder_images(root, augmentations=4, flip=True)
    everything = torch.arange(len(plain))
    plain_KRR3, flipped_KRR3 = plain.pixels(everything), flipped.pixels(everything)
    assert np.array_equal(flipped_KRR3[::2], plain_KRR3[::2])
    assert np.array_equal(flipped_KRR3[1::2], plain_KRR3[1::2, :, ::-1])
    assert flipped.key != plain.key
    assert same.key == held_out.key


def test_flips_need_augmentations():
    with pytest.raises(ValueError, match="flip=true needs augmentations of 2 or more"):
        DataConfig(kind="image_folder", flip=True)


def test_augmentations_of_a_picture_cost_one_decoding(root, folder_images, monkeypatch):
    images, opened, times = folder_images(root, augmentations=4)[0], Cut.opened, []
    monkeypatch.setattr(Cut, "opened", lambda cut, path: times.append(path) or opened(cut, path))
    images.decode(range(24))
    assert len(times) == 6


# Which pictures


def test_pictures_kept_in_memory_are_the_same_and_are_decoded_once(
    root, folder_images, monkeypatch
):
    read, _ = folder_images(root, augmentations=2)
    kept, held_out = folder_images(root, augmentations=2, in_memory=True)
    opened, was = Counter(), Cut.opened
    monkeypatch.setattr(Cut, "opened", lambda cut, path: opened.update([path]) or was(cut, path))
    for indices in ([3, 0, 3], [], [11, 3, 1], range(12), [5]):
        found = kept.pixels(np.asarray(indices, dtype=np.int64))
        assert len(found) == len(indices)
        if len(indices):
            np.testing.assert_array_equal(found, read.decode(indices).pixels_BRR3)
    opened.clear()
    kept.tensors(torch.arange(12))
    assert not opened
    assert (kept.key, kept.about(), len(held_out)) == (read.key, read.about(), 7)


def test_labels_are_places_of_sorted_names(root, folder_images):
    training, held_out = folder_images(root, augmentations=2, num_classes=3)
    assert training.classes == held_out.classes == {"a": 0, "b": 1, "c": 2}
    assert training.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 6
    assert held_out.labels.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert training.labels.dtype == np.int64
    assert training.num_classes == 3


def test_one_folder_may_be_both(root, folder_images):
    training, held_out = folder_images(root, train="val", val="val")
    assert [training.path(i) for i in range(7)] == [held_out.path(i) for i in range(7)]
    assert training.key != held_out.key


@pytest.mark.parametrize("number", [1, 5, 7])
def test_held_out_pictures_are_balanced(root, folder_images, number):
    """Turn by turn, by brute force: a class gets its next picture where it still has one."""
    left, taken = {"a": 2, "b": 4, "c": 1}, Counter()
    while taken.total() < number:
        for name in left:
            if taken[name] < left[name] and taken.total() < number:
                taken[name] += 1
    images = folder_images(root, held_out=number)[1]
    names = [images.path(i).relative_to(root / "val").as_posix() for i in range(number)]
    assert names == [f"{name}/{i:02d}.png" for name in "abc" for i in range(taken[name])]
    assert len(images) == number


def test_keys_name_the_content(root, copy, folder_images):
    """Other content, order or cuts have another key; another place, names or workers do not."""
    base = folder_images(root)
    same = folder_images(copy, workers=4, encode_batch=3, unreadable="skip")
    assert [images.key for images in same] == [images.key for images in base]
    keys = [images.key for images in base]
    for fields in ({"seed": 1}, {"augmentations": 2}, {"resize_ratio": 1.25}, {"image_size": 16}):
        keys.append(folder_images(root, **fields)[0].key)
    keys += [folder_images(root, image_size=16)[1].key, folder_images(root, held_out=3)[1].key]
    first, second = copy / "train" / "a" / "00.png", copy / "train" / "a" / "01.png"
    first.rename(copy / "train" / "a" / "0.png")
    assert folder_images(copy)[0].key == keys[0]
    second.rename(copy / "train" / "a" / "-.png")  # before the other
    keys.append(folder_images(copy)[0].key)
    (copy / "train" / "a" / "-.png").rename(copy / "train" / "b" / "01.png")  # another label
    keys.append(folder_images(copy)[0].key)
    assert len(set(keys)) == len(keys)
    assert folder_images(root, seed=1, augmentations=2)[1].key == base[1].key


def bmp(path, seed):
    """A picture whose file has one size, whatever is seen in it."""
    Image.fromarray(noise(seed, 12, 10, 3)).save(path)


def test_keys_see_content_of_the_same_size_and_time(tmp_path, make_folder, monkeypatch):
    """Another folder, and the same one overwritten in place."""
    monkeypatch.setattr("dmoe_var.files.SETTLED_NS", -(10**12))  # new files are kept too
    hashes, keys = tmp_path / "hashes", []
    root, other = make_folder(tmp_path / "x", train=(2,), val=(2,)), tmp_path / "y"
    config = DataConfig("image_folder", image_size=8, root=str(root))
    for path in list(root.glob("*/*/*.png")):
        bmp(path.with_suffix(".bmp"), 0)
        path.unlink()
    shutil.copytree(root, other)
    times = {path: path.stat().st_mtime_ns for path in root.glob("*/*/*.bmp")}
    keys.append(load_data(config, hashes=hashes)[0].key)
    time.sleep(0.05)  # a tick of the file system's clock
    for path, written in times.items():
        bmp(path, 1)
        os.utime(path, ns=(written, written))
    keys.append(load_data(config, hashes=hashes)[0].key)
    keys.append(load_data(replace(config, root=str(other)), hashes=hashes)[0].key)
    assert keys[0] == keys[2] != keys[1]


def test_nothing_is_read_before_the_key_is_asked_for(root, folder_images, monkeypatch):
    monkeypatch.setattr("dmoe_var.data.image_folder.sha256_of_all", None)
    assert len(folder_images(root)[0].pixels(torch.arange(3))) == 3


def test_root_is_needed_where_it_is_used(folder_images):
    config = DataConfig(kind="image_folder", train="a", val="b")
    with pytest.raises(ConfigError, match=r"data.root=null.*holds a/ and b/"):
        load_data(config)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (
            {"train": "training"},
            ("training: no readable image folder", "No such file", "data.root"),
        ),
        ({"val": "train/a/00.png"}, ("00.png: no readable image folder", "Not a directory")),
        ({"val": "train/a"}, ("train/a: holds no folders", ".jpg")),
        ({"num_classes": 1000}, ("train: found 3 class folders, expected data.num_classes=1000",)),
        ({"held_out": 8}, ("val: holds 7 pictures", "data.held_out=8")),
    ],
)
def test_wrong_folders(root, folder_images, fields, parts):
    assert_refused(folder_images, root, *parts, **fields)


def test_classes_must_be_the_same(copy, folder_images):
    shutil.rmtree(copy / "train" / "b")
    for name in "vwxyz":
        shutil.copytree(copy / "train" / "a", copy / "train" / name)
    said = f"{copy}/train alone has v, w, x, ... (5 in all)"
    assert_refused(folder_images, copy, said, f"{copy}/val alone has b")


def test_empty_class(copy, folder_images):
    shutil.rmtree(copy / "val" / "b")
    (copy / "val" / "b").mkdir()
    assert_refused(folder_images, copy, f"{copy}/val: 1 class folders hold no picture", ": b")


# Very long pictures


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_001), (4, 131)])
def test_long_pictures_are_cut_before_they_are_enlarged(tmp_path, size):
    """The centre is the one of the whole picture enlarged; its height is a divisor, so that both
    scales are the same."""
    pixels = noise(1, *size, 3)
    Image.fromarray(pixels).save(tmp_path / "long.png")
    opened = CENTRE.opened(tmp_path / "long.png")
    assert max(opened.size) <= (WIDEST + 3) * 36
    whole = Image.fromarray(pixels).resize([36 * n // min(size) for n in size], Image.LANCZOS)
    left, top = (round((pixels - 32) / 2) for pixels in whole.size)
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(CENTRE.cropped(opened, 0, 0), expected)


def test_pictures_that_are_not_very_long_stay_whole(tmp_path):
    Image.fromarray(noise(1, 32 * WIDEST, 32, 3)).save(tmp_path / "long.png")
    assert CENTRE.opened(tmp_path / "long.png").size == (36 * WIDEST, 36)


# Broken pictures


def no_picture(path):
    path.write_text("<html>Not Found</html>")


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("gone")


@pytest.mark.parametrize(("harm", "workers"), [(no_picture, 0), (link_to_nothing, 2)])
def test_unreadable_pictures(copy, folder_images, harm, workers):
    path = copy / "train" / "c" / "01.png"
    harm(path)
    images = folder_images(copy, augmentations=2, workers=workers)[0]
    with pytest.raises(DataError, match=f"{path}: unreadable picture"):
        images.pixels(torch.arange(12))
    with pytest.raises(DataError):
        images.tensors(torch.tensor([9]))
    decoded = images.decode(range(12))
    assert [item.index for item in decoded.unreadable] == [8, 9]
    assert {item.path for item in decoded.unreadable} == {str(path)}
    assert all(item.reason for item in decoded.unreadable)
    readable = torch.tensor([i for i in range(12) if i not in (8, 9)])
    assert np.array_equal(decoded.pixels_BRR3, images.pixels(readable))
    assert images.decode([8]).pixels_BRR3.shape == (0, 8, 8, 3)


def test_names_that_are_not_text(copy, folder_images):
    broken = os.fsencode(copy / "train" / "a") + b"/\xff\n.png"
    try:
        os.close(os.open(broken, os.O_CREAT | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system takes no such names")
    (item,) = folder_images(copy)[0].decode(range(7)).unreadable
    assert item.path == f"{copy}/train/a/\\udcff\\n.png"


# Real pictures


def test_real_imagenet(real_pictures, folder_images):
    wnids = ("n01440764", "n01443537", "n02123045", "n04037443")
    root = real_pictures(
        "imagenet-one-per-class-288.tar", lambda name: name.split("/")[1] in wnids, len(wnids)
    )
    training, held_out = folder_images(root, train="val", image_size=256, num_classes=4)
    assert tuple(training.classes) == wnids
    for index, pixels in enumerate(held_out.pixels(torch.arange(4))):
        assert min(rgb(held_out.path(index)).size) == 288
        assert np.array_equal(pixels, by_hand(held_out.path(index), 288, 256))
    assert training.pixels(torch.arange(4)).shape == (4, 256, 256, 3)


def test_real_cifar(real_pictures, folder_images):
    root = real_pictures(
        "cifar10-imagefolder.tar.gz", lambda name: name.endswith(("/0000.jpg", "/0001.jpg")), 4
    )
    training, held_out = folder_images(root, train="test", val="test", image_size=32)
    assert len(training) == len(held_out) == 4
    for index, pixels in enumerate(held_out.pixels(torch.arange(4))):
        assert rgb(held_out.path(index)).size == (32, 32)
        assert np.array_equal(pixels, by_hand(held_out.path(index)))
