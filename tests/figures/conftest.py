"""Looks at what a figure wrote."""

from __future__ import annotations

import pytest
from PIL import Image


@pytest.fixture
def opened(tmp_path):
    """opened(path): the picture, which must be all that was written, readable and not blank."""

    def opened(path):
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
        image = Image.open(path)
        image.load()
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24)) > 10
        return image

    return opened


@pytest.fixture
def unsaved(monkeypatch, tmp_path):
    """unsaved(module, draw, *args): what draw(*args, path) draws, as a figure to look into."""
    figures = []

    def unsaved(module, draw, *args):
        monkeypatch.setattr(module, "save", lambda figure, paths: figures.append(figure))
        draw(*args, tmp_path / "figure.png")
        return figures[-1]

    return unsaved
