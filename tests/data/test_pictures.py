"""Picture files of every kind: the picture's own colours, or unreadable, never clipped."""

from __future__ import annotations

import errno
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from dmoe_var.data.pictures import UnreadablePictureError, open_rgb

RAMP_HW = np.arange(256, dtype=np.uint8).reshape(16, 16)
"""Every grey level once."""
DEEP_HW = RAMP_HW.astype(np.uint16) * 257
"""The same in 16 bits."""


def grey(path):
    """The picture's levels, where its three channels are one."""
    pixels = np.asarray(open_rgb(path))
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert np.array_equal(pixels, pixels[..., :1].repeat(3, 2))
    return pixels[..., 0]


def pgm(path, most):
    """A binary PGM of `most` + 1 levels."""
    levels = np.round(RAMP_HW / 255 * most).astype(">u2" if most > 255 else "u1")
    path.write_bytes(b"P5 16 16 %d\n" % most + levels.tobytes())


SIXTEEN_BITS = {
    "deep.png": lambda path: Image.fromarray(DEEP_HW).save(path),
    "big_endian.tiff": lambda path: Image.fromarray(DEEP_HW.astype(">u2")).save(path),
    "16.pgm": lambda path: pgm(path, 65535),
    "12.pgm": lambda path: pgm(path, 4095),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_grey_of_more_than_eight_bits_is_scaled(tmp_path, kind):
    SIXTEEN_BITS[kind](tmp_path / kind)
    assert np.array_equal(grey(tmp_path / kind), RAMP_HW)


def test_sixteen_bits_are_rounded(tmp_path):
    deep_HW = np.random.default_rng(0).integers(0, 2**16, (64, 64), dtype=np.uint16)
    Image.fromarray(deep_HW).save(tmp_path / "noise.png")
    exact = deep_HW.astype(np.float64) / 65535 * 255
    assert np.abs(grey(tmp_path / "noise.png") - exact).max() <= 0.5


def test_a_tiff_in_which_zero_is_white(tmp_path):
    path = tmp_path / "negative.tif"
    Image.fromarray(65535 - DEEP_HW).save(path)
    content = bytearray(path.read_bytes())
    entry = content.index(bytes([6, 1, 3, 0, 1, 0, 0, 0, 1, 0]))  # photometric, one short: black
    content[entry + 8] = 0
    path.write_bytes(bytes(content))
    assert np.array_equal(grey(path), RAMP_HW)


@pytest.mark.parametrize("values", [np.float32(RAMP_HW) / 255, np.int32(RAMP_HW) * 2**20])
def test_values_of_unknown_range_are_unreadable(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "unknown.tif")
    with pytest.raises(UnreadablePictureError, match=r"unknown.tif: .*which of them is white"):
        open_rgb(tmp_path / "unknown.tif")


def with_alpha(mode):
    """Colours that are there under an alpha of 0 too."""
    levels = Image.fromarray(RAMP_HW)
    channels = [levels] * (len(mode) - 1) + [Image.fromarray(RAMP_HW.T.copy())]
    return Image.merge(mode, channels)


EIGHT_BITS = {
    "grey.png": lambda path: Image.fromarray(RAMP_HW).save(path),
    "8.pgm": lambda path: pgm(path, 255),
    "la.png": lambda path: with_alpha("LA").save(path),
    "rgba.png": lambda path: with_alpha("RGBA").save(path),
    "palette.png": lambda path: Image.fromarray(RAMP_HW).convert("P").save(path),
    "clear.png": lambda path: (
        Image.fromarray(RAMP_HW).convert("P").save(path, transparency=bytes(range(256)))
    ),
    "key.png": lambda path: Image.fromarray(RAMP_HW).save(path, transparency=7),
    "cmyk.tif": lambda path: Image.fromarray(RAMP_HW).convert("RGB").convert("CMYK").save(path),
}


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_colours_are_the_picture_s_own(tmp_path, kind):
    EIGHT_BITS[kind](tmp_path / kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(grey(tmp_path / kind), RAMP_HW)


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(RAMP_HW > 127).save(tmp_path / "bits.png")
    assert np.array_equal(grey(tmp_path / "bits.png"), np.where(RAMP_HW > 127, 255, 0))


def test_a_cmyk_jpeg_is_no_negative(tmp_path):
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    white.save(tmp_path / "white.jpg")
    assert grey(tmp_path / "white.jpg").min() > 250


# Unreadable


NO_PICTURES = {
    "empty.png": (b"", "an empty file"),
    "page.jpg": (b"<html>Not Found</html>", "of no format that Pillow knows"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "chunk.png": (b"\x89PNG\r\n\x1a\n" + bytes(30), "chunk.png: unreadable picture ("),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture(tmp_path, name):
    content, reason = NO_PICTURES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadablePictureError) as caught:
        open_rgb(tmp_path / name)
    assert reason in str(caught.value)
    assert str(caught.value).count(name) == 1
    assert "\n" not in str(caught.value)


def test_cut_short(tmp_path):
    Image.fromarray(RAMP_HW).save(tmp_path / "cut.bmp")
    content = (tmp_path / "cut.bmp").read_bytes()
    (tmp_path / "cut.bmp").write_bytes(content[:-60])
    with pytest.raises(UnreadablePictureError, match=r"cut.bmp: .*truncated") as caught:
        open_rgb(tmp_path / "cut.bmp")
    assert "OSError" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(UnreadablePictureError, match=r"none.png: .*\(No such file or directory\)"):
        open_rgb(tmp_path / "none.png")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadablePictureError, match="no regular file"):
        open_rgb(tmp_path / "pipe.png")


def test_more_pixels_than_memory(tmp_path):
    header = b"P5 60000 60000 255\n"
    (tmp_path / "bomb.pgm").write_bytes(header)
    with pytest.raises(UnreadablePictureError, match="3600000000 pixels"):
        open_rgb(tmp_path / "bomb.pgm")


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_the_machine_s_limits_are_no_fault_of_the_picture(tmp_path, monkeypatch, error):
    def refuse(path):
        raise error

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(type(error)) as caught:
        open_rgb(tmp_path / "any.png")
    assert caught.value is error
