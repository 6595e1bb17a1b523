"""Translate between class indices and names, for `sample.classes` and for titles of pictures."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache

from dmoe_var.data import cifar10
from dmoe_var.data.config import DataConfig
from dmoe_var.errors import ConfigError

IMAGENET_CLASSES = 1000


@cache
def imagenet_names() -> tuple[str, ...]:
    """Return the 1,000 names of torchvision's classifiers, in the order of the class folders."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def class_names(data: DataConfig, num_classes: int) -> tuple[str, ...] | None:
    """Name a model's classes by index; return None if only indices are known.

    They are data.class_names. If none are given: digits "0" to "9", cifar10's own, and ImageNet's
    for image_folder with 1,000 classes.
    """
    if data.class_names:
        return data.class_names
    if data.kind == "digits":
        return tuple(str(digit) for digit in range(num_classes))
    if data.kind == "cifar10":
        return cifar10.CLASS_NAMES
    return imagenet_names() if num_classes == IMAGENET_CLASSES else None


def title(names: Sequence[str] | None, index: int) -> str:
    """Title a class in pictures: by its name, or by its number if there is none."""
    return f"class {index}" if names is None else names[index]


def class_index(given: int | str, data: DataConfig, num_classes: int, key: str) -> int:
    """Find the index of a class given by index or by name.

    A name may have any case, spaces, underscores or hyphens, and no apostrophes. If two differ in
    case alone, the exact spelling decides. Raise ConfigError, naming `key`, for an index out of
    range and for a name that is unknown or ambiguous.
    """
    if isinstance(given, int) or re.fullmatch(r"-?\d+", given):
        if not 0 <= int(given) < num_classes:
            raise ConfigError(f"{key}: {given} must be within 0..{num_classes - 1}")
        return int(given)
    names = class_names(data, num_classes)
    allowed = f"allowed: an index within 0..{num_classes - 1}"
    if names is None:
        raise ConfigError(f"{key}: {given!r}: these classes have no known names; {allowed}")
    if given in names:
        return names.index(given)
    wanted = slug(given)
    same = [i for i, name in enumerate(names) if slug(name) == wanted]
    if len(same) == 1:
        return same[0]
    if same:
        found = " or ".join(f"{names[i]!r} ({i})" for i in same)
        raise ConfigError(f"{key}: {given!r} may be {found}; give that spelling or the index")
    close = difflib.get_close_matches(given, names, n=1)
    hint = "".join(f"; did you mean {name} ({names.index(name)})?" for name in close)
    raise ConfigError(f"{key}: {given!r} is no class{hint}; {allowed}, or a name")


@cache
def slug(name: str) -> str:
    """Turn a name into part of a file's name: lower-case letters, digits, single underscores."""
    return re.sub(r"[\W_]+", "_", name.lower().replace("'", "")).strip("_")
