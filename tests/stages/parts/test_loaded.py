"""The stages on a folder of pictures: tokens, what they cost, and training on them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from composing import CONFIGS, composed
from PIL import Image
from pydantic import TypeAdapter

from dmoe_var.config.parse import parse_config
from dmoe_var.data.config import DataConfig
from dmoe_var.data.token_cache import About, Seconds, TokenSet
from dmoe_var.errors import ConfigError, DataError, InputError
from dmoe_var.experiment.graph import record_if_done, require, run_through
from dmoe_var.experiment.record import Record
from dmoe_var.stages.parts.loaded import token_metrics, token_sets


@pytest.fixture
def pictures(tmp_path):
    """Two classes of 5 training and 3 held-out pictures; the first of each part is broken."""
    generator = np.random.default_rng(0)
    for part, number in (("train", 5), ("test", 3)):
        for name in ("cats", "dogs"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder.parent / "cats" / "0.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.fixture
def on_pictures(make_experiment, pictures, tmp_path):
    """on_pictures(**changes of keys of data, others with dots) -> Experiment on the pictures."""

    def on_pictures(**changes):
        keys = {"kind": "image_folder", "root": str(pictures), "val": "test", **changes}
        dotted = {key if "." in key else f"data.{key}": value for key, value in keys.items()}
        return make_experiment(tmp_path / "runs", {"var.num_classes": 2, **dotted})

    return on_pictures


def through(experiment, last):
    return run_through(experiment, last, lambda stage, done: None)


def test_training_on_pictures(on_pictures, pictures):
    """The VQ-VAE trains on pictures directly, the VAR on their tokens; the record says how many."""
    readable(pictures)
    experiment = on_pictures(augmentations=3, num_classes=2)
    record = through(experiment, "train_var")
    assert record.metrics["tokens_images"] == 9 * 3 + 5
    assert record.metrics["tokens_unreadable"] == 0
    assert record.metrics["tokens_decode_images_per_s"] > 0
    assert record.metrics["tokens_encode_images_per_s"] > 0
    assert np.isfinite(record.metrics["val_ce"])
    vqvae = Record.read(experiment.folder("train_vqvae") / "result.json")
    assert np.isfinite(vqvae.metrics["val_mse"])


def test_unreadable_pictures_are_told_by_the_first_who_reads_them(on_pictures, pictures):
    with pytest.raises(DataError, match=f"{pictures}/train/cats/0.png: unreadable picture"):
        through(on_pictures(unreadable="skip", **{"train_vqvae.batch_size": 10}), "train_vqvae")


def test_skipped_pictures_are_counted(on_pictures, pictures, make_vqvae, monkeypatch):
    """Given base models, as with published weights: no stage but the token cache reads pictures."""
    vqvae = make_vqvae()
    with pytest.raises(DataError, match=r"^1 unreadable pictures, first .*cats/0.png"):
        token_sets(on_pictures(), vqvae)
    sets = token_sets(on_pictures(unreadable="skip", held_out=4), vqvae)
    assert [len(tokens) for tokens in sets] == [9, 3]
    assert token_metrics(sets)["tokens_unreadable"] == 2
    assert token_metrics(sets)["tokens_images"] == 12


def test_rates_are_of_all_sets():
    """30 images in 2 + 4 seconds of decoding, and 1 + 2 of encoding."""
    sets = [
        TokenSet(None, None, (1,), About(images, 1, Seconds(2 * s, s, 9.0)))
        for images, s in ((10, 1.0), (20, 2.0))
    ]
    assert token_metrics(sets) == {
        "tokens_images": 30,
        "tokens_unreadable": 2,
        "tokens_decode_images_per_s": 5.0,
        "tokens_encode_images_per_s": 10.0,
    }


def test_classes_that_only_the_folder_tells(on_pictures, make_vqvae):
    experiment = on_pictures(**{"var.num_classes": 3})
    with pytest.raises(DataError, match=r"found 2 class folders, expected var.num_classes=3"):
        token_sets(experiment, make_vqvae())


def readable(pictures):
    for part in ("train", "test"):
        (pictures / part / "cats" / "0.png").unlink()


def test_records_say_which_pictures(on_pictures, pictures):
    """Labels by folder, what was passed over, and a name for the content."""
    readable(pictures)
    (pictures / "train" / "dogs" / "notes.txt").touch()
    data = through(on_pictures(), "train_var").about["data"]
    assert data["training"]["classes"] == {"cats": 0, "dogs": 1}
    assert data["training"]["passed_over"] == {".txt": 1}
    assert data["held_out"]["passed_over"] == {}
    assert data["training"]["content"].startswith("folder-random-8-")
    assert data["held_out"]["content"].startswith("folder-centre-8-")


def test_other_pictures_in_the_same_experiment(on_pictures, pictures, tmp_path):
    """A moved folder is the same data, and so is one that is not there; of other content nothing
    is done."""
    readable(pictures)
    record = through(on_pictures(), "train_var")
    moved = pictures.rename(tmp_path / "moved")
    experiment = on_pictures(root=str(moved))
    assert record_if_done(experiment, "train_var") == record
    picture = moved / "train" / "dogs" / "1.png"
    before, times = picture.read_bytes(), picture.stat()
    other = (moved / "train" / "cats" / "1.png").read_bytes()
    assert other != before
    picture.write_bytes(other)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert record_if_done(experiment, "train_var") is None
    with pytest.raises(InputError, match="data has other content than there"):
        require(experiment, "train_var")
    assert record_if_done(on_pictures(root=str(tmp_path / "nowhere")), "train_var") == record


def test_fewer_classes_than_the_model_s_are_no_wrong_configuration(make_experiment):
    changes = {"data.kind": "image_folder", "data.num_classes": 100, "var.num_classes": 1000}
    assert make_experiment(changes=changes).config.data.num_classes == 100


def test_classes_are_checked_without_the_disk(make_experiment):
    changes = {"data.kind": "image_folder", "data.num_classes": 1000, "var.num_classes": 999}
    with pytest.raises(ConfigError, match=r"var.num_classes=999 must be 1000.*image_folder") as c:
        make_experiment(changes=changes)
    assert "\n" not in str(c.value)
    experiment = make_experiment(changes={**changes, "var.num_classes": 1000})
    assert experiment.config.data.root is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.root": "x"}, r"data\.root=x is read by kind=cifar10 and image_folder alone"),
        ({"data.workers": 2}, r"data\.workers=2 is read by kind=image_folder alone"),
        ({"data.num_classes": 4}, r"data\.num_classes=4 must be 10 or null for kind=digits"),
        ({"data.kind": "folder"}, "data.kind='folder': .*'digits', 'cifar10' or 'image_folder'"),
        ({"data.kind": "cifar10"}, r"data\.image_size=8 must be 32 for kind=cifar10"),
        (
            {"data.kind": "cifar10", "data.resize_ratio": 2},
            r"data\.resize_ratio=2.0 is read by kind=image_folder alone",
        ),
        ({"data.unreadable": "drop"}, "data.unreadable='drop': .*'refuse' or 'skip'"),
        ({"data.augmentations": 0}, "data.augmentations=0: .*greater than 0"),
        ({"data.train": ""}, "data.train='': "),
    ],
)
def test_wrong_values(make_experiment, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_experiment(changes=changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_data_set_composes(path):
    data = json.dumps(composed("pipeline", f"data={path.stem}")["data"])
    config = TypeAdapter(DataConfig).validate_json(data, strict=True)
    sizes = {"digits": 16, "cifar10": 32, "cifar10_download": 32, "imagenet": 256}
    assert config.image_size == {**sizes, "imagenet_512": 512}[path.stem]
    assert config.known_classes() == (1000 if "imagenet" in path.stem else 10)


def test_published_models_take_imagenet():
    """The whole configuration of a published model on ImageNet holds together without a root."""
    for model, data in (("d16", "imagenet"), ("d36_512", "imagenet_512")):
        options = (f"model={model}", "moe=published", f"data={data}", "sweep=quick")
        plain = composed("pipeline", *options)
        assert parse_config(plain).data.image_size == parse_config(plain).vqvae.image_size
