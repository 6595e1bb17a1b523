"""Names of classes: what `sample.classes` may be given as, and what pictures are titled with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache

from dmoe_var.errors import ConfigError

IMAGENET_CLASSES = 1000
MOST_HINTS = 5


@cache
def imagenet_names() -> tuple[str, ...]:
    """The 1,000 names that torchvision's classifiers carry, in the order of the class folders."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def class_names(kind: str, num_classes: int) -> tuple[str, ...] | None:
    """Names of the classes of a kind of data by index; None where only indices are known.

    digits: "0" to "9". image_folder with 1,000 classes: ImageNet's.
    """
    if kind == "digits":
        return tuple(str(digit) for digit in range(num_classes))
    return imagenet_names() if num_classes == IMAGENET_CLASSES else None


def title(names: Sequence[str] | None, index: int) -> str:
    """A class as pictures are titled: its name, or its number where there is none."""
    return f"class {index}" if names is None else names[index]


def class_index(given: int | str, kind: str, num_classes: int, key: str) -> int:
    """Index of a class given by index or by name.

    A name may have spaces, underscores or hyphens, any case, and no apostrophes; where two differ
    in case alone, the exact spelling decides. ConfigError, naming `key`, for an index out of
    range and for a name that is unknown or ambiguous.
    """
    if isinstance(given, int) or re.fullmatch(r"-?\d+", given):
        if not 0 <= int(given) < num_classes:
            raise ConfigError(f"{key}: {given} must be within 0..{num_classes - 1}")
        return int(given)
    names = class_names(kind, num_classes)
    allowed = f"allowed: an index within 0..{num_classes - 1}"
    if names is None:
        raise ConfigError(f"{key}: {given!r}: these classes have no known names; {allowed}")
    same = [i for i, name in enumerate(names) if _plain(name) == _plain(given)]
    exact = [i for i in same if _spaced(names[i]) == _spaced(given)]
    if len(same) == 1 or len(exact) == 1:
        return (exact or same)[0]
    if same:
        found = " or ".join(f"{names[i]!r} ({i})" for i in same)
        raise ConfigError(f"{key}: {given!r} may be {found}; give that spelling or the index")
    closest = _closest(given, names)
    hint = f"; closest: {', '.join(f'{names[i]} ({i})' for i in closest)}" if closest else ""
    raise ConfigError(f"{key}: {given!r} is no class{hint}; {allowed}, or a name")


def slug(name: str) -> str:
    """A name as part of a file's name: letters, digits and underscores."""
    return re.sub(r"\W+", "_", _plain(name))


def _spaced(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.replace("'", "")).strip()


@cache
def _plain(name: str) -> str:
    return _spaced(name).lower()


def _closest(given: str, names: Sequence[str]) -> list[int]:
    """Indices of the names that hold all the words, then of those that are spelled alike."""
    plain = [_plain(name) for name in names]
    words = set(_plain(given).split())
    holding = [name for name in plain if words and words <= set(name.split())]
    alike = difflib.get_close_matches(_plain(given), plain, n=MOST_HINTS)
    return [plain.index(name) for name in dict.fromkeys([*holding, *alike])][:MOST_HINTS]
