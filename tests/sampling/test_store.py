"""Parts: neither processes nor interruptions change what is stored, and nothing is drawn twice."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dmoe_var import Threshold
from dmoe_var.arrays import write_npz
from dmoe_var.sampling import store
from dmoe_var.sampling.draw import Drawing
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.sampling.store import StoredDrawing

LABELS = np.arange(11) % 5
SAMPLING = SamplingConfig(cfg=2.0, top_k=20, batch_size=3)
NUM_PARTS = 4


@pytest.fixture
def stored(tiny_models, tmp_path):
    """stored(**fields of StoredDrawing) -> a drawing of eleven images in four parts."""

    def stored(folder=tmp_path / "drawn", fingerprint="f", format="npz"):
        drawing = Drawing(*tiny_models, LABELS, 5, SAMPLING, Threshold(0.3))
        return StoredDrawing(drawing, folder, fingerprint, format)

    return stored


@pytest.fixture(scope="module")
def whole(tiny_models, tmp_path_factory):
    """The folder of an uninterrupted run of one process, both formats, and what it returned."""
    drawing = Drawing(*tiny_models, LABELS, 5, SAMPLING, Threshold(0.3))
    folder = tmp_path_factory.mktemp("whole")
    return folder, StoredDrawing(drawing, folder, "f", "both").draw()


@pytest.fixture
def left_by(whole, tmp_path):
    """left_by(format) -> a folder as a drawing in that format leaves it, without drawing anew."""

    def left_by(format):
        folder = shutil.copytree(whole[0], tmp_path / "left")
        if format == "png":
            (folder / "samples.npz").unlink()
        if format == "npz":
            shutil.rmtree(folder / "png")
        return folder

    return left_by


@pytest.fixture
def drawn_batches(monkeypatch):
    """The numbers of the batches that were drawn."""
    numbers, batch = [], Drawing.batch

    def counted(self, number):
        numbers.append(number)
        return batch(self, number)

    monkeypatch.setattr(Drawing, "batch", counted)
    return numbers


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(stored, n): a run that ends before batch n is drawn."""
    batch = Drawing.batch

    def interrupted(stored, number):
        def until(self, wanted):
            if wanted == number:
                raise KeyboardInterrupt
            return batch(self, wanted)

        with monkeypatch.context() as patch:
            patch.setattr(Drawing, "batch", until)
            with pytest.raises(KeyboardInterrupt):
                stored.draw()

    return interrupted


def files_of(folder):
    """Content by place; what drawing took differs from run to run."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name != "drawn.npz"}


def test_joined_parts_are_the_drawing(stored, whole):
    """samples.npz as the ADM evaluator reads it, a PNG an image, no parts left."""
    folder, drawn = whole
    batches = [stored().drawing.batch(i) for i in range(NUM_PARTS)]
    images = np.concatenate([batch.samples.images for batch in batches])
    with np.load(folder / "samples.npz") as file:
        assert sorted(file) == ["arr_0", "labels", "seeds"]
        assert np.array_equal(file["arr_0"], images)
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["labels"], LABELS)
        assert file["seeds"].tolist() == [5] * len(LABELS)
    names = [f"{i:06d}.png" for i in range(len(LABELS))]
    assert sorted(p.name for p in (folder / "png").iterdir()) == names
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / "png" / name)), image)
    assert sorted(p.name for p in folder.iterdir()) == ["drawn.npz", "png", "samples.npz"]
    for si in (2, 3):
        ran = [n for batch in batches for n in batch.ran.pairs[si]]
        assert drawn.ran.pairs[si] == tuple(ran)
    assert drawn.seconds > 0


@pytest.mark.parametrize(("format", "place"), [("npz", "samples.npz"), ("png", "png")])
def test_one_format_leaves_the_other_out(stored, whole, format, place):
    ours = stored(format=format)
    assert ours.place == place
    ours.draw()
    both = files_of(whole[0])
    assert files_of(ours.folder) == {n: c for n, c in both.items() if n.startswith(place)}


@pytest.mark.parametrize("number", [0, 2])
def test_an_interrupted_run_goes_on(stored, whole, interrupted, drawn_batches, number):
    """Bitwise what an uninterrupted one leaves; parts that are stored are not drawn again."""
    ours = stored(format="both")
    interrupted(ours, number)
    assert len(list(ours.folder.glob("parts/*"))) == number
    assert not (ours.folder / "samples.npz").exists()
    drawn = ours.draw()
    assert drawn_batches == list(range(number, NUM_PARTS))
    assert files_of(ours.folder) == files_of(whole[0])
    assert drawn.ran == whole[1].ran


def test_processes_share_the_parts(stored, whole, drawn_batches, monkeypatch):
    """In turn here; tests/scripts/test_torchrun.py starts two."""
    monkeypatch.setattr(store, "world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(store, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(store, "is_main", lambda rank=rank: rank == 0)
        drawn = stored(format="both").draw()
    assert drawn_batches == [1, 3, 0, 2]
    assert files_of(stored().folder) == files_of(whole[0])
    assert drawn.ran == whole[1].ran


def test_what_is_finished_is_not_drawn_again(stored, whole, left_by, drawn_batches):
    """As where measuring the images failed."""
    folder = left_by("npz")
    before = files_of(folder)
    assert stored(folder).draw() == whole[1]
    assert drawn_batches == []
    assert files_of(folder) == before


def broken(path, how):
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_lost_samples_are_drawn_again(stored, whole, left_by, drawn_batches, how):
    folder = left_by("npz")
    broken(folder / "samples.npz", how)
    stored(folder).draw()
    assert len(drawn_batches) == NUM_PARTS
    assert files_of(folder)["samples.npz"] == files_of(whole[0])["samples.npz"]


def test_a_lost_png_is_drawn_again(stored, whole, left_by):
    folder = left_by("png")
    (folder / "png" / "000004.png").unlink()
    stored(folder, format="png").draw()
    assert files_of(folder)["png/000004.png"] == files_of(whole[0])["png/000004.png"]


@pytest.mark.parametrize("how", ["gone", "empty", "flipped"])
def test_a_broken_part_is_drawn_again(stored, whole, interrupted, how):
    ours = stored()
    interrupted(ours, 3)
    broken(ours.folder / "parts" / "part_00001.npz", how)
    ours.draw()
    assert files_of(ours.folder)["samples.npz"] == files_of(whole[0])["samples.npz"]


def test_parts_of_other_images_are_drawn_again(stored, tiny_models, interrupted, whole):
    """Another fingerprint in the same folder, with more images, cut off; its files do not stay."""
    ours = stored(format="both")
    others = Drawing(*tiny_models, np.arange(20) % 5, 6, SAMPLING, Threshold(0.3))
    interrupted(StoredDrawing(others, ours.folder, "other", "both"), 6)
    (ours.folder / "png" / ".3.tmp").touch()
    ours.draw()
    assert files_of(ours.folder) == files_of(whole[0])


def test_a_run_between_two_of_another_fingerprint(stored, whole, left_by, monkeypatch):
    """Killed once its samples lay there: what the first run knew does not speak for them."""
    ours = stored(left_by("npz"))

    def killed(path, arrays):
        if path.name == "drawn.npz":
            raise KeyboardInterrupt
        write_npz(path, arrays)

    other = replace(ours, drawing=replace(ours.drawing, seed=6), fingerprint="other")
    with monkeypatch.context() as patch:
        patch.setattr("dmoe_var.sampling.store.write_npz", killed)
        with pytest.raises(KeyboardInterrupt):
            other.draw()
    assert files_of(ours.folder)["samples.npz"] != files_of(whole[0])["samples.npz"]
    ours.draw()
    assert files_of(ours.folder)["samples.npz"] == files_of(whole[0])["samples.npz"]
    assert not (ours.folder / "parts").exists()


def test_a_stored_part_never_outlives_its_pngs(stored, monkeypatch, whole):
    """Killed between the files of another fingerprint and their part: the old part is gone."""
    ours, write = stored(format="both"), StoredDrawing._write_pngs

    def kill_after(number):
        def write_pngs(self, part, images, replace):
            write(self, part, images, replace)
            if part == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(StoredDrawing, "_write_pngs", write_pngs)

    kill_after(2)
    with pytest.raises(KeyboardInterrupt):
        ours.draw()  # parts 0 and 1 are stored
    kill_after(1)
    others = replace(ours.drawing, seed=6)
    other = replace(ours, drawing=others, fingerprint="other")
    with pytest.raises(KeyboardInterrupt):
        other.draw()
    kill_after(None)
    ours.draw()
    assert files_of(ours.folder) == files_of(whole[0])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("npz", "npz"), ("npz", "both"), ("npz", "png"), ("png", "npz"), ("both", "png")],
)
@pytest.mark.parametrize("same_folder", [False, True])
def test_images_in_another_format_are_not_drawn_again(
    stored, whole, tmp_path, left_by, drawn_batches, theirs, ours, same_folder
):
    """From another folder or from its own, whole, and with what is known of them."""
    left = left_by(theirs)
    before = files_of(left)
    folder = left if same_folder else tmp_path / "ours"
    found = replace(stored(folder, format=ours), others=(tmp_path / "gone", left))
    assert found.draw() == whole[1]
    assert drawn_batches == []
    expected = files_of(whole[0])
    kept = {"npz": "s", "png": "p", "both": ("s", "p")}[ours]
    of_format = {name: content for name, content in expected.items() if name.startswith(kept)}
    complete = same_folder and theirs == "both"  # nothing is missing, and nothing is deleted
    assert files_of(folder) == (expected if complete else of_format)
    assert found.draw() == whole[1]
    assert same_folder or files_of(left) == before


@pytest.mark.parametrize(
    ("place", "how"),
    [("samples.npz", "cut"), ("samples.npz", "gone"), ("png/000004.png", "cut"), ("drawn.npz", "")],
)
def test_broken_images_are_not_taken_over(
    stored, whole, tmp_path, left_by, drawn_batches, place, how
):
    left = left_by("png" if place.startswith("png") else "npz")
    broken(left / place, how)
    replace(stored(tmp_path / "ours"), others=(left,)).draw()
    assert len(drawn_batches) == NUM_PARTS
    assert files_of(tmp_path / "ours")["samples.npz"] == files_of(whole[0])["samples.npz"]


def test_images_that_are_being_replaced_are_not_taken_over(
    stored, whole, tmp_path, left_by, drawn_batches, monkeypatch
):
    """Another process begins to draw in their folder while they are copied."""
    left, link = left_by("npz"), os.link

    def replaced_meanwhile(source, target):
        link(source, target)
        (left / "drawn.npz").unlink(missing_ok=True)

    monkeypatch.setattr(os, "link", replaced_meanwhile)
    replace(stored(tmp_path / "ours"), others=(left,)).draw()
    assert len(drawn_batches) == NUM_PARTS
    assert files_of(tmp_path / "ours") == {"samples.npz": files_of(whole[0])["samples.npz"]}


def test_images_are_copied_where_files_have_one_name(
    stored, whole, tmp_path, left_by, drawn_batches, monkeypatch
):
    def no_links(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    left = left_by("npz")
    assert replace(stored(tmp_path / "ours"), others=(left,)).draw() == whole[1]
    assert files_of(tmp_path / "ours") == files_of(left)
    assert drawn_batches == []


def test_parts_of_another_batch_size_are_drawn_again(stored):
    """Part 1 is four images of class 0 in batches of 4 as in batches of 7: 4..7 and 7..10."""
    of_size = {}
    for size in (4, 7):
        sampling = replace(SAMPLING, batch_size=size)
        drawing = replace(stored().drawing, labels=np.zeros(11, np.int64), sampling=sampling)
        of_size[size] = replace(stored(), drawing=drawing)
        of_size[size]._make_part(1)
    four, seven = (each.drawing.batch(1).samples.images for each in of_size.values())
    found = of_size[7]._read_part(1).samples.images
    assert np.array_equal(found, seven)
    assert not np.array_equal(found, four)


def test_counts_of_another_format_are_not_read(stored, interrupted, drawn_batches):
    """A part, and a finished drawing, as versions before this one left them: drawn again."""
    ours = stored()
    interrupted(ours, 1)
    as_before(ours.folder / "parts/part_00000.npz")
    first = ours.draw()
    as_before(ours.folder / "drawn.npz")
    assert ours.draw().ran == first.ran
    assert drawn_batches == [*range(NUM_PARTS), *range(NUM_PARTS)]


def as_before(path):
    """By image and scale the pairs, and what is charged for them, in the place of the times."""
    with np.load(path) as file:
        arrays = dict(file)
    times_NSK = arrays.pop("times")
    pairs_NS = times_NSK @ np.arange(times_NSK.shape[-1])
    write_npz(path, {**arrays, "pairs": pairs_NS, "charged": pairs_NS.astype(float)})
