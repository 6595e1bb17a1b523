"""Classes by name: every name finds its index however it is spelled, all else is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dmoe_var.data.class_names import class_index, class_names, imagenet_names, slug, title
from dmoe_var.data.config import DataConfig
from dmoe_var.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

KNOWN = {0: "tench", 207: "golden retriever", 985: "daisy", 999: "toilet tissue"}
"""Of ImageNet's classes, whose order is that of the WordNet numbers."""
SAME_BUT_FOR_CASE = {"Cardigan": 264, "cardigan": 474}
SPELLINGS = [
    str,
    str.upper,
    lambda name: name.lower().replace(" ", "-"),
    lambda name: name.replace("-", "_").replace(" ", "_").replace("'", ""),
    lambda name: f" {name.replace(' ', '  ')} ",
]


def find(given, num_classes=1000, **data):
    data = DataConfig(**{"kind": "image_folder", **data})
    return class_index(given, data, num_classes, "sample.classes")


def test_imagenet():
    names = class_names(DataConfig(kind="image_folder"), 1000)
    assert len(set(names)) == 1000
    assert {i: names[i] for i in KNOWN} == KNOWN


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_names_find_their_class(spelled):
    for i, name in list(enumerate(imagenet_names()))[::20]:
        assert find(spelled(name)) == i


def test_names_that_differ_in_case_alone():
    assert {name: find(name) for name in SAME_BUT_FOR_CASE} == SAME_BUT_FOR_CASE
    with pytest.raises(ConfigError, match=r"'CARDIGAN' may be 'Cardigan' \(264\) or 'cardigan'"):
        find("CARDIGAN")


@pytest.mark.parametrize("given", [207, "207", 0, 999])
def test_indices(given):
    assert find(given) == int(given)


@pytest.mark.parametrize(
    ("given", "arguments", "parts"),
    [
        ("golden retreiver", {}, ("is no class; did you mean golden retriever (207)?", "0..999")),
        ("xyzzy", {}, ("'xyzzy' is no class; allowed: an index within 0..999",)),
        (1000, {}, ("1000 must be within 0..999",)),
        ("-1", {}, ("-1 must be within 0..999",)),
        ("cat", {"num_classes": 10}, ("'cat'", "no known names", "0..9")),
        ("ten", {"num_classes": 10, "kind": "digits"}, ("'ten' is no class", "0..9")),
        ("dog", {"num_classes": 2, "class_names": ("cat", "cow")}, ("'dog' is no class", "0..1")),
        (10, {"num_classes": 10, "kind": "digits"}, ("10 must be within 0..9",)),
    ],
)
def test_what_is_no_class(given, arguments, parts):
    with pytest.raises(ConfigError) as caught:
        find(given, **arguments)
    message = str(caught.value)
    assert message.startswith("sample.classes: ")
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_digits():
    names = class_names(DataConfig(), 10)
    assert [find(name, 10, kind="digits") for name in names] == list(range(10))
    assert title(names, 3) == "3"


def test_names_that_are_given():
    """For any folders of pictures; the packaged CIFAR-10 has its own in either layout."""
    data = DataConfig(kind="image_folder", class_names=("cat", "polar bear"))
    assert class_names(data, 2) == ("cat", "polar bear")
    assert find("Polar_Bear", 2, class_names=data.class_names) == 1
    given = yaml.safe_load((ROOT / "configs/data/cifar10.yaml").read_text())["class_names"]
    assert tuple(given) == class_names(DataConfig(kind="cifar10", image_size=32), 10)


def test_titles_and_file_names():
    assert title(class_names(DataConfig(kind="image_folder"), 10), 3) == "class 3"
    assert title(imagenet_names(), 207) == "golden retriever"
    slugs = [slug(name) for name in imagenet_names()]
    assert slugs[207] == "golden_retriever"
    assert all(slug.replace("_", "").isalnum() and slug.isascii() for slug in slugs)
