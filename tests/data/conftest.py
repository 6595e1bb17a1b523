"""Small folders of pictures, made here or taken from the real sets, and the token cache's parts."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmoe_var.data import load_data
from dmoe_var.data.config import DataConfig


def draw(path, seed, size=(13, 11)):
    """A picture of noise, (width, height); lossless formats keep every pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def make_folder():
    """make_folder(root, counts={"train": (3, 2)}) -> root with pictures in class folders a, b...

    A folder gets as many classes as its counts are, and as many pictures a class as they say.
    """

    def make_folder(root, **counts):
        seed = 0
        for part, numbers in counts.items():
            for name, number in zip("abcdefgh"[: len(numbers)], numbers, strict=True):
                for index in range(number):
                    draw(root / part / name / f"{index:02d}.png", seed)
                    seed += 1
        return root

    return make_folder


@pytest.fixture(scope="session")
def folder_images():
    """folder_images(root, **keys of DataConfig) -> training and held-out pictures of 8 px."""

    def folder_images(root, **fields):
        fields = {"image_size": 8, **fields}
        return load_data(DataConfig(kind="image_folder", root=str(root), **fields))

    return folder_images


@pytest.fixture(scope="session")
def real_pictures(tmp_path_factory):
    """real_pictures(archive, names) -> a folder with these members of ../shared/data/archive."""
    beside = Path(__file__).resolve().parents[3] / "shared"
    shared = Path(os.environ.get("DMOE_VAR_SHARED", beside)) / "data"

    def real_pictures(archive, wanted, number):
        """The first `number` members for whose name `wanted` is true."""
        if not (shared / archive).is_file():
            pytest.skip(f"no {shared / archive}; DMOE_VAR_SHARED names the folder of data/")
        folder = tmp_path_factory.mktemp("real")
        with tarfile.open(shared / archive) as tar:
            for member in tar:
                if member.isfile() and wanted(member.name):
                    tar.extract(member, folder, filter="data")
                    number -= 1
                if number == 0:
                    break
        return folder

    return real_pictures
