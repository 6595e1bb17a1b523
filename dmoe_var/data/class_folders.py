"""List class folders: the pictures that each holds, their order, and the label of each folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dmoe_var.data.pictures import EXTENSIONS
from dmoe_var.errors import DataError

WNIDS = tuple((Path(__file__).parent / "imagenet_wnids.txt").read_text().split())
"""WordNet ids of ImageNet's 1,000 classes: a class's label is the place of its id."""
SHOWN = 3
"""Most names that an error lists."""
SHOWN_LABELS = 10
"""Most classes whose labels are all printed."""

Pictures: TypeAlias = dict[str, list[str]]
"""Pictures of each class folder, both in order, as paths relative to that folder."""


@dataclass(frozen=True)
class Listing:
    """What a folder of class folders holds, and how many entries are no picture of a class."""

    folder: Path
    pictures: Pictures
    passed_over: Counter[str]
    """Number of such entries by kind."""

    def line(self) -> str:
        """Say in one line what was passed over; "" for nothing."""
        if not self.passed_over:
            return ""
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.passed_over.most_common())
        return (
            f"{self.folder}: {self.passed_over.total()} entries passed over ({kinds}); pictures "
            f"are files of {' '.join(EXTENSIONS)} in class folders"
        )


def list_pictures(folder: Path) -> Listing:
    """List the pictures in each class folder and in the folders within it, links followed.

    Pictures and class folders have the order of torchvision's ImageFolder, except that whole
    numbers are sorted as numbers (`sorted_classes`). Names that begin with a dot are passed over.
    Raise DataError for a folder that is missing or unreadable, a class without pictures, and two
    class folders of the same number.
    """
    passed_over: Counter[str] = Counter()
    try:
        names, files = _entries(folder, passed_over)
        passed_over.update("outside class folders" for _ in files)
        pictures = {
            name: _pictures_in(folder, name, passed_over) for name in sorted_classes(names, folder)
        }
    except OSError as error:
        raise DataError(
            f"{error.filename}: no readable image folder ({error.strerror}); data.root, data.train "
            "and data.val name it"
        ) from error
    empty = [name for name, found in pictures.items() if not found]
    kinds = " ".join(EXTENSIONS)
    if empty:
        raise DataError(
            f"{folder}: {len(empty)} class folders hold no picture ({kinds}): {shown(empty)}"
        )
    if not pictures:
        raise DataError(f"{folder}: holds no folders, expected one a class with pictures ({kinds})")
    return Listing(folder, pictures, passed_over)


def _pictures_in(folder: Path, name: str, passed_over: Counter[str]) -> list[str]:
    """List paths relative to a class folder, by the text of the folder's path, then by name."""
    found, start = [], len(os.path.join(folder / name, ""))
    for path in visible_files(folder / name, passed_over, (os.path.realpath(folder),)):
        if path.lower().endswith(EXTENSIONS):
            found.append(path[start:])
        else:
            passed_over[os.path.splitext(path)[1].lower() or "without extension"] += 1
    return sorted(found, key=os.path.split)


def visible_files(
    folder: Path | str, passed_over: Counter[str], above: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the paths of the files under a folder, links followed, and count by kind what is passed
    over. above: real paths of the folders that it is in."""
    real = os.path.realpath(folder)
    if real in above:
        passed_over["links to a folder that they are in"] += 1
        return
    folders, files = _entries(folder, passed_over)
    yield from (os.path.join(folder, name) for name in files)
    for name in folders:
        yield from visible_files(os.path.join(folder, name), passed_over, (*above, real))


def _entries(folder: Path | str, passed_over: Counter[str]) -> tuple[list[str], list[str]]:
    """List the names of the folders and of the files in a folder."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                passed_over["hidden"] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif entry.is_symlink() or entry.is_file():
                files.append(entry.name)  # a link to nothing too: it will be found unreadable
            else:
                passed_over["no regular file"] += 1
    return folders, files


def sorted_classes(names: Sequence[str], folder: Path) -> list[str]:
    """Sort names of class folders: as numbers if all are whole numbers, else as text.

    Raise DataError if two are the same number.
    """
    by_number: dict[int, str] = {}
    for name in sorted(names):
        number = _number(name)
        if number is None:
            return sorted(names)
        if number in by_number:
            raise DataError(
                f"{folder}: class folders {by_number[number]} and {name} are one number"
            )
        by_number[number] = name
    return [by_number[number] for number in sorted(by_number)]


def _number(name: str) -> int | None:
    return int(name) if re.fullmatch("-?[0-9]+", name) else None


def labels_of(names: Sequence[str], num_classes: int) -> list[int] | None:
    """Label class folders, in order, for a model of num_classes classes; None for unknown labels.

    As many folders as classes are labelled by their places. Fewer keep the labels of the model:
    a whole number is its own label, a wnid of ImageNet has its place among the 1,000.
    """
    if len(names) == num_classes:
        return list(range(num_classes))
    labels = [_number(name) for name in names]
    if num_classes == len(WNIDS) and set(names) <= set(WNIDS):
        labels = [WNIDS.index(name) for name in names]
    known = [label for label in labels if label is not None and 0 <= label < num_classes]
    return known if len(known) == len(names) < num_classes else None


def balanced(pictures: Pictures, number: int, folder: Path, key: str) -> Pictures:
    """Take the first pictures of each class, in turns, until there are `number`.

    Raise DataError if there are fewer.
    """
    most = sum(map(len, pictures.values()))
    if number > most:
        raise DataError(f"{folder}: holds {most} pictures, {key}={number} asks for more")
    turns = sorted(
        (turn, place) for place, files in enumerate(pictures.values()) for turn in range(len(files))
    )
    taken = np.bincount([place for _, place in turns[:number]], minlength=len(pictures))
    return {name: files[:n] for (name, files), n in zip(pictures.items(), taken, strict=True)}


def shown(names: Sequence[str]) -> str:
    """Join the first of some names; if there are more, say how many in all."""
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
