"""Sample a set of images in parts, by any number of processes, and join them into one file.

A part is a batch of the drawing. Parts that are stored already are not sampled again, so an
interrupted run goes on where it was. Legend: N images, B images of a part, S scales with a rule,
K = E + 1: from none of the E experts to all.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dmoe_var.arrays import StoredRows, is_intact, read_npz, write_npz
from dmoe_var.data.image_sets import ImageArray, ImageFolder, Pixels
from dmoe_var.distributed import barrier, from_main, is_main, rank, world_size
from dmoe_var.errors import DataError
from dmoe_var.files import whole_file
from dmoe_var.moe.counts import ExpertHistogram
from dmoe_var.sampling.draw import SAMPLES_FILE, Batch, Drawing, Samples

PARTS_FOLDER = "parts"
PNG_FOLDER = "png"
DRAWN_FILE = "drawn.npz"
"""File beside images that are all sampled: their fingerprint, the experts that ran, seconds."""
EXPERTS_RUN = ("scales", "times")
"""Names of the arrays that hold an `ExpertHistogram`: int64 (S,) and (B, S, K)."""

ImageFormat = Literal["npz", "png", "both"]


@dataclass(frozen=True)
class Drawn:
    """Holds what a finished drawing leaves beside its images."""

    ran: ExpertHistogram
    seconds: float
    """Sum over all batches, in whichever process and run they were sampled."""


@dataclass(frozen=True)
class StoredDrawing:
    """Stores a drawing's images in a folder: samples.npz, png/NNNNNN.png (one per image) or both.

    fingerprint: hash of all that the images depend on; images with another one are sampled again.
    others: folders that may hold images of the same fingerprint, in any format; they are taken
    over instead of being sampled again.
    """

    drawing: Drawing
    folder: Path
    fingerprint: str
    format: ImageFormat = "npz"
    others: tuple[Path, ...] = ()

    @property
    def place(self) -> str:
        """Name, within the folder, of the file or folder that holds the images."""
        return PNG_FOLDER if self.format == "png" else SAMPLES_FILE

    def draw(self, progress: str | None = None) -> Drawn:
        """Sample what is not stored yet. All processes of a run call this, and all get the result.

        Process i modulo their number samples part i; the main one then joins the parts and removes
        them. `progress` names the main process's bar; None shows none.
        """
        done = from_main(self._start() if is_main() else None)
        if done is not None:
            return done
        mine = range(rank(), self.drawing.num_batches, world_size())
        shown = progress is not None and is_main()
        for number in tqdm(mine, progress, unit="part", leave=False, disable=not shown):
            self._make_part(number)
        barrier()
        return from_main(self._join() if is_main() else Drawn(ExpertHistogram.none(0), 0.0))

    def png_path(self, index: int) -> Path:
        """Return the path of image `index` as PNG."""
        return self.folder / PNG_FOLDER / f"{index:06d}.png"

    def _first(self, number: int) -> int:
        """Return the index of a part's first image."""
        return number * self.drawing.sampling.batch_size

    def _part_path(self, number: int) -> Path:
        return self.folder / PARTS_FOLDER / f"part_{number:05d}.npz"

    def _make_part(self, number: int) -> None:
        """Sample and store a part, its PNG files first, unless it is stored."""
        try:
            batch, drawn = self._read_part(number), False
        except DataError:  # missing, broken or of another fingerprint
            batch, drawn = self.drawing.batch(number), True
            # A stored part promises that its PNG files are there, so it must not outlive them.
            self._part_path(number).unlink(missing_ok=True)
        if self.format != "npz":
            self._write_pngs(number, batch.samples.images, replace=drawn)
        if drawn:
            about = {"first": np.array(self._first(number)), **vars(batch.samples)}
            write_npz(self._part_path(number), about | self._about(batch))

    def _about(self, drawn: Batch | Drawn) -> dict[str, np.ndarray]:
        """Return what is stored of a batch or of the whole drawing, beside the images."""
        ran, seconds = drawn.ran, np.array(drawn.seconds)
        experts_run = (np.array(ran.scales, dtype=np.int64), ran.times_NSK)
        named = dict(zip(EXPERTS_RUN, experts_run, strict=True))
        return {**named, "seconds": seconds, "fingerprint": np.array(self.fingerprint)}

    def _read_part(self, number: int) -> Batch:
        """Read a stored part; DataError if it is missing, broken or of another drawing."""
        path, labels = self._part_path(number), self.drawing.labels_of(number)
        names = ("first", "images", "labels", "seeds", *EXPERTS_RUN, "seconds", "fingerprint")
        first, images, found, seeds, *ran, seconds, fingerprint = read_npz(path, names)
        # Batches of another size begin elsewhere, or end there.
        same = int(first) == self._first(number) and np.array_equal(found, labels)
        if not same or str(fingerprint) != self.fingerprint:
            raise DataError(f"{path}: belongs to other images")
        return Batch(Samples(images, found, seeds), _histogram(*ran), float(seconds))

    def _write_pngs(self, number: int, images: np.ndarray, replace: bool) -> None:
        """Write one file per image; without `replace`, only those that are missing."""
        first = self._first(number)
        (self.folder / PNG_FOLDER).mkdir(parents=True, exist_ok=True)
        # One temporary name per process: `whole_file` would list the folder for every image.
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
        """Join all parts into samples.npz, unless the format is png, and remove the parts."""
        drawing, ran, seconds = self.drawing, list[ExpertHistogram](), list[float]()

        def images() -> Iterator[np.ndarray]:
            for number in range(drawing.num_batches):
                batch = self._read_part(number)
                ran.append(batch.ran)
                seconds.append(batch.seconds)
                yield batch.samples.images

        if self.format == "png":
            for _ in images():
                pass
        else:
            self._write_samples(images())
        self._clear()
        drawn = Drawn(ExpertHistogram.joined(ran), sum(seconds))
        write_npz(self.folder / DRAWN_FILE, self._about(drawn))
        shutil.rmtree(self.folder / PARTS_FOLDER)
        return drawn

    def _start(self) -> Drawn | None:
        """Find what an earlier run finished, here or in another folder; None if there are images
        to sample."""
        done = self._finished() or self._taken_over()
        if done is None:  # from here on, the file would not describe what the folder holds
            (self.folder / DRAWN_FILE).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder / PARTS_FOLDER, ignore_errors=True)
        return done

    def _finished(self) -> Drawn | None:
        """Return what an earlier run left here; None unless all its images are there and intact."""
        if self.format != "png" and not is_intact(self.folder / SAMPLES_FILE):
            return None
        if self.format != "npz" and not all(_is_png(path) for path in self._pngs_in(self.folder)):
            return None
        return self._drawn_in(self.folder)

    def _drawn_in(self, folder: Path) -> Drawn | None:
        """Read what is known of a folder's images; None if they are not those of this drawing."""
        try:
            names = (*EXPERTS_RUN, "seconds", "fingerprint")
            *ran, seconds, fingerprint = read_npz(folder / DRAWN_FILE, names)
        except DataError:
            return None
        same = str(fingerprint) == self.fingerprint
        return Drawn(_histogram(*ran), float(seconds)) if same else None

    def _pngs_in(self, folder: Path) -> tuple[Path, ...]:
        """Return the paths of this drawing's PNG files in a folder that has them."""
        names = [self.png_path(index).name for index in range(len(self.drawing.labels))]
        return tuple(folder / PNG_FOLDER / name for name in names)

    def _taken_over(self) -> Drawn | None:
        """Take finished images over from some folder, and return what is known of them, or None."""
        for folder in (self.folder, *self.others):
            drawn = self._drawn_in(folder)
            images = self._images_in(folder) if drawn is not None else None
            if drawn is None or images is None:
                continue
            self.folder.mkdir(parents=True, exist_ok=True)
            if folder != self.folder:
                (self.folder / DRAWN_FILE).unlink(missing_ok=True)
            self._store(images, folder)
            if self._drawn_in(folder) != drawn:
                continue  # another process has begun to sample there
            if folder != self.folder:
                _link(folder / DRAWN_FILE, self.folder / DRAWN_FILE)
            return drawn
        return None

    def _images_in(self, folder: Path) -> Pixels | None:
        """Open the images of a finished drawing; None if some are missing or broken."""
        if is_intact(folder / SAMPLES_FILE):
            return ImageArray(Samples.load(folder / SAMPLES_FILE).images)
        pngs = self._pngs_in(folder)
        if all(_is_png(path) for path in pngs):
            return ImageFolder(folder, self.drawing.image_size, pngs)
        return None

    def _store(self, images: Pixels, folder: Path) -> None:
        """Store the images that lie in `folder` here, in this drawing's format."""
        indices = torch.arange(len(images)).split(self.drawing.sampling.batch_size)
        pieces = (images.pixels(indices_B) for indices_B in indices)
        if self.format != "png" and isinstance(images, ImageFolder):
            self._write_samples(pieces)
        elif self.format != "png" and folder != self.folder:
            _link(folder / SAMPLES_FILE, self.folder / SAMPLES_FILE)
        if self.format != "npz":
            for number, indices_B in enumerate(indices):
                self._write_pngs(number, images.pixels(indices_B), replace=True)
        self._clear()

    def _write_samples(self, pieces: Iterable[np.ndarray]) -> None:
        drawing, num_images, size = self.drawing, len(self.drawing.labels), self.drawing.image_size
        rows = StoredRows((num_images, size, size, 3), np.uint8, pieces)
        seeds = np.full(num_images, drawing.seed, dtype=np.int64)
        named: dict[str, Any] = {"arr_0": rows, "labels": drawing.labels, "seeds": seeds}
        write_npz(self.folder / SAMPLES_FILE, named)

    def _clear(self) -> None:
        """Remove what another format, another set of images or a killed process left."""
        if self.format == "png":
            (self.folder / SAMPLES_FILE).unlink(missing_ok=True)
        kept = len(self.drawing.labels) if self.format != "npz" else 0
        for path in (self.folder / PNG_FOLDER).glob("*.png"):
            if path.stem.isdecimal() and int(path.stem) >= kept:
                path.unlink()
        for path in (self.folder / PNG_FOLDER).glob(".*.tmp"):
            path.unlink()


def _is_png(path: Path) -> bool:
    """Say whether a PNG file is there and whole."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it if the file system has no hard links."""
    with whole_file(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _histogram(scales: np.ndarray, times_NSK: np.ndarray) -> ExpertHistogram:
    return ExpertHistogram(tuple(scales.tolist()), times_NSK)
