"""Draws a set of images in parts, by any number of processes, and joins them into one file.

A part is a batch of the drawing. Parts that are stored already are not drawn again, so that an
interrupted run goes on where it was. Legend: N images, B images of a part, S scales with a rule.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image
from tqdm import tqdm

from dmoe_var.arrays import Rows, is_intact, read_npz, write_npz
from dmoe_var.errors import DataError
from dmoe_var.sampling.draw import SAMPLES_FILE, Batch, Charged, Drawing, Pairs, Samples
from dmoe_var.training.distributed import barrier, from_main, is_main, rank, world_size

PARTS_FOLDER = "parts"
PNG_FOLDER = "png"
DRAWN_FILE = "drawn.npz"
"""What is known of images that are all drawn: fingerprint, experts run, seconds."""
EXPERTS_RUN = ("scales", "pairs", "charged")
"""Arrays of the experts that ran: the scales (S,), and by image and scale the pairs and what the
authors' accounting charges for them."""

ImageFormat = Literal["npz", "png", "both"]


@dataclass(frozen=True)
class Drawn:
    """What a finished drawing leaves beside its images."""

    pairs: Pairs
    seconds: float
    """Sum over all batches, whichever process drew them and in whichever run."""
    charged: Charged = field(default_factory=dict)


@dataclass(frozen=True)
class StoredDrawing:
    """A drawing whose images go to a folder: samples.npz, png/NNNNNN.png (one an image) or both.

    fingerprint: hash of all that the images depend on; what was stored under another one is drawn
    again.
    """

    drawing: Drawing
    folder: Path
    fingerprint: str
    format: ImageFormat = "npz"

    @property
    def place(self) -> str:
        """Name, within the folder, of what holds the images."""
        return PNG_FOLDER if self.format == "png" else SAMPLES_FILE

    def draw(self, progress: str | None = None) -> Drawn:
        """Draw what is not stored yet; called by all processes of a run, and returned to all.

        Part i is drawn by process i modulo their number; the main one then joins the parts and
        removes them. `progress` names the main process's bar; None shows none.
        """
        done = from_main(self._start() if is_main() else None)
        if done is not None:
            return done
        mine = range(rank(), self.drawing.num_batches, world_size())
        shown = progress is not None and is_main()
        for number in tqdm(mine, progress, unit="part", leave=False, disable=not shown):
            self._make_part(number)
        barrier()
        return from_main(self._join() if is_main() else Drawn({}, 0.0))

    def png_path(self, index: int) -> Path:
        """Where image `index` lies as PNG."""
        return self.folder / PNG_FOLDER / f"{index:06d}.png"

    def _part_path(self, number: int) -> Path:
        return self.folder / PARTS_FOLDER / f"part_{number:05d}.npz"

    def _make_part(self, number: int) -> None:
        """Draw and store a part, its PNG files first, unless it is stored."""
        try:
            batch, drawn = self._read_part(number), False
        except DataError:  # missing, broken or of another fingerprint
            batch, drawn = self.drawing.batch(number), True
            # A part that is stored says that its PNG files are: it must not outlive them.
            self._part_path(number).unlink(missing_ok=True)
        if self.format != "npz":
            self._write_pngs(number, batch.samples.images, replace=drawn)
        if drawn:
            scales = sorted(batch.pairs)
            samples = batch.samples
            write_npz(
                self._part_path(number),
                {
                    "images": samples.images,
                    "labels": samples.labels,
                    "seeds": samples.seeds,
                    "scales": np.array(scales, dtype=np.int64),
                    "pairs": _columns(batch.pairs, len(samples.labels), np.int64),
                    "charged": _columns(batch.charged, len(samples.labels), np.float64),
                    "seconds": np.array(batch.seconds),
                    "fingerprint": np.array(self.fingerprint),
                },
            )

    def _read_part(self, number: int) -> Batch:
        """A stored part; DataError where it is missing, broken or not of this drawing."""
        path, labels = self._part_path(number), self.drawing.labels_of(number)
        names = ("images", "labels", "seeds", *EXPERTS_RUN, "seconds", "fingerprint")
        images, found, seeds, scales, *experts, seconds, fingerprint = read_npz(path, names)
        size = self.drawing.image_size
        shape = (len(labels), size, size, 3)
        if (
            str(fingerprint) != self.fingerprint
            or not np.array_equal(found, labels)
            or images.shape != shape
            or images.dtype != np.uint8
        ):
            raise DataError(f"{path}: belongs to other images")
        pairs, charged = (_by_scale(scales, array_BS) for array_BS in experts)
        return Batch(Samples(images, found, seeds), pairs, float(seconds), charged)

    def _write_pngs(self, number: int, images: np.ndarray, replace: bool) -> None:
        """One file an image; without `replace` only those that are missing."""
        first = number * self.drawing.sampling.batch_size
        (self.folder / PNG_FOLDER).mkdir(parents=True, exist_ok=True)
        # One temporary name a process: `whole_file` would list the folder for every image.
        owner = f"{platform.node()}-{os.getpid()}"
        temporary = self.folder / PNG_FOLDER / f".{owner}.tmp"
        try:
            for index, image in enumerate(images, start=first):
                path = self.png_path(index)
                if replace or not path.exists():
                    Image.fromarray(image).save(temporary, format="PNG")
                    os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _join(self) -> Drawn:
        """samples.npz of all parts, one after the other; then the parts go."""
        drawing, pairs, charged, seconds = self.drawing, [], [], []

        def images() -> Iterator[np.ndarray]:
            for number in range(drawing.num_batches):
                batch = self._read_part(number)
                num_images = len(batch.samples.labels)
                pairs.append(_columns(batch.pairs, num_images, np.int64))
                charged.append(_columns(batch.charged, num_images, np.float64))
                seconds.append(batch.seconds)
                yield batch.samples.images

        num_images, size = len(drawing.labels), drawing.image_size
        path = self.folder / SAMPLES_FILE
        self._remove_other_pngs()
        if self.format == "png":
            path.unlink(missing_ok=True)
            for _ in images():
                pass
        else:
            rows = Rows((num_images, size, size, 3), np.uint8, images())
            seeds = np.full(num_images, drawing.seed, dtype=np.int64)
            write_npz(path, {"arr_0": rows, "labels": drawing.labels, "seeds": seeds})
        scales, pairs_NS = np.array(sorted(drawing.rules), dtype=np.int64), np.concatenate(pairs)
        charged_NS = np.concatenate(charged)
        about = {
            "scales": scales,
            "pairs": pairs_NS,
            "charged": charged_NS,
            "seconds": np.array(sum(seconds)),
            "fingerprint": np.array(self.fingerprint),
        }
        write_npz(self.folder / DRAWN_FILE, about)
        shutil.rmtree(self.folder / PARTS_FOLDER)
        return Drawn(_by_scale(scales, pairs_NS), sum(seconds), _by_scale(scales, charged_NS))

    def _start(self) -> Drawn | None:
        """What an earlier run finished; None where images are to be drawn."""
        done = self._finished()
        if done is None:  # from here on, the file would not tell what the folder holds
            (self.folder / DRAWN_FILE).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder / PARTS_FOLDER, ignore_errors=True)
        return done

    def _finished(self) -> Drawn | None:
        """What an earlier run left, where all of its images are there and intact."""
        try:
            names = (*EXPERTS_RUN, "seconds", "fingerprint")
            scales, *experts, seconds, fingerprint = read_npz(self.folder / DRAWN_FILE, names)
        except DataError:
            return None
        if str(fingerprint) != self.fingerprint:
            return None
        if self.format != "png" and not is_intact(self.folder / SAMPLES_FILE):
            return None
        indices = range(len(self.drawing.labels)) if self.format != "npz" else ()
        if not all(self.png_path(index).exists() for index in indices):
            return None
        pairs, charged = (_by_scale(scales, array_NS) for array_NS in experts)
        return Drawn(pairs, float(seconds), charged)

    def _remove_other_pngs(self) -> None:
        """What another set of images or a killed process left in the folder of PNG files."""
        kept = len(self.drawing.labels) if self.format != "npz" else 0
        for path in (self.folder / PNG_FOLDER).glob("*.png"):
            if path.stem.isdecimal() and int(path.stem) >= kept:
                path.unlink()
        for path in (self.folder / PNG_FOLDER).glob(".*.tmp"):
            path.unlink()


def _columns(by_scale: Pairs | Charged, num_images: int, dtype: DTypeLike) -> np.ndarray:
    """By image and scale, (B, S)."""
    columns = [np.asarray(by_scale[si], dtype=dtype) for si in sorted(by_scale)]
    return np.stack(columns, axis=1) if columns else np.zeros((num_images, 0), dtype)


def _by_scale(scales: np.ndarray, array_BS: np.ndarray) -> dict[int, tuple[Any, ...]]:
    columns = zip(scales.tolist(), array_BS.T.tolist(), strict=True)
    return {si: tuple(column) for si, column in columns}
