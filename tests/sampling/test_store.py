"""Parts: neither processes nor interruptions change what is stored, and nothing is drawn twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmoe_var import Threshold
from dmoe_var.arrays import write_npz
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
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
def drawn_batches(monkeypatch):
    """The numbers of the batches that were drawn."""
    numbers, batch = [], Drawing.batch

    def counted(self, number):
        numbers.append(number)
        return batch(self, number)

    monkeypatch.setattr(Drawing, "batch", counted)
    return numbers


@pytest.fixture
def interrupt_at(monkeypatch):
    """interrupt_at(n): batch n cannot be drawn; interrupt_at(None): all can."""
    batch = Drawing.batch

    def interrupt_at(number):
        def interrupted(self, wanted):
            if wanted == number:
                raise KeyboardInterrupt
            return batch(self, wanted)

        monkeypatch.setattr(Drawing, "batch", interrupted)

    return interrupt_at


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


@pytest.mark.parametrize("number", range(NUM_PARTS))
def test_an_interrupted_run_goes_on(stored, whole, interrupt_at, number):
    """Bitwise what an uninterrupted one leaves; parts that are stored are not drawn again."""
    ours = stored(format="both")
    interrupt_at(number)
    with pytest.raises(KeyboardInterrupt):
        ours.draw()
    assert len(list(ours.folder.glob("parts/*"))) == number
    assert not (ours.folder / "samples.npz").exists()
    interrupt_at(None)
    drawn_again, batch = [], Drawing.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawing, "batch", lambda d, n: drawn_again.append(n) or batch(d, n))
        drawn = ours.draw()
    assert drawn_again == list(range(number, NUM_PARTS))
    assert files_of(ours.folder) == files_of(whole[0])
    assert drawn.ran == whole[1].ran


def test_what_is_finished_is_not_drawn_again(stored, drawn_batches):
    """As where measuring the images failed."""
    first = stored().draw()
    before = files_of(stored().folder)
    assert stored().draw() == first
    assert drawn_batches == list(range(NUM_PARTS))
    assert files_of(stored().folder) == before


@pytest.mark.parametrize("broken", ["gone", "cut", "flipped"])
def test_lost_samples_are_drawn_again(stored, whole, drawn_batches, broken):
    stored().draw()
    path = stored().folder / "samples.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if broken == "gone":
        path.unlink()
    else:
        path.write_bytes(content if broken == "flipped" else content[:-30])
    stored().draw()
    assert len(drawn_batches) == 2 * NUM_PARTS
    assert path.read_bytes() == (whole[0] / "samples.npz").read_bytes()


def test_a_lost_png_is_made_again(stored, whole):
    ours = stored(format="png")
    ours.draw()
    ours.png_path(4).unlink()
    ours.draw()
    assert ours.png_path(4).read_bytes() == (whole[0] / "png" / "000004.png").read_bytes()


@pytest.mark.parametrize("broken", ["gone", "empty", "cut", "flipped"])
def test_a_broken_part_is_drawn_again(stored, whole, interrupt_at, broken):
    ours = stored()
    interrupt_at(3)
    with pytest.raises(KeyboardInterrupt):
        ours.draw()
    path = ours.folder / "parts" / "part_00001.npz"
    content = bytearray(path.read_bytes())
    if broken == "gone":
        path.unlink()
    elif broken == "flipped":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-40] if broken == "cut" else b"")
    interrupt_at(None)
    ours.draw()
    assert files_of(ours.folder)["samples.npz"] == files_of(whole[0])["samples.npz"]


def test_parts_of_other_images_are_drawn_again(stored, tiny_models, interrupt_at, whole):
    """Another fingerprint in the same folder, with more images, cut off; its files do not stay."""
    ours = stored(format="both")
    others = Drawing(*tiny_models, np.arange(20) % 5, 6, SAMPLING, Threshold(0.3))
    other = StoredDrawing(others, ours.folder, "other", "both")
    interrupt_at(6)
    with pytest.raises(KeyboardInterrupt):
        other.draw()
    interrupt_at(None)
    (ours.folder / "png" / ".3.tmp").touch()
    ours.draw()
    assert files_of(ours.folder) == files_of(whole[0])


def test_a_run_between_two_of_another_fingerprint(stored, whole, monkeypatch):
    """Killed once its samples lay there: what the first run knew does not speak for them."""
    ours = stored()
    ours.draw()

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


@pytest.mark.parametrize("theirs", ["npz", "png", "both"])
@pytest.mark.parametrize("ours", ["npz", "png", "both"])
@pytest.mark.parametrize("same_folder", [False, True])
def test_images_in_another_format_are_not_drawn_again(
    stored, whole, tmp_path, drawn_batches, theirs, ours, same_folder
):
    """From another folder or from its own, whole, and with what is known of them."""
    first = stored(tmp_path / "theirs", format=theirs)
    drawn = first.draw()
    before = files_of(first.folder)
    folder = first.folder if same_folder else tmp_path / "ours"
    found = replace(stored(folder, format=ours), others=(tmp_path / "gone", first.folder))
    assert found.draw() == drawn
    assert drawn_batches == list(range(NUM_PARTS))
    expected = files_of(whole[0])
    kept = {"npz": "s", "png": "p", "both": ("s", "p")}[ours]
    of_format = {name: content for name, content in expected.items() if name.startswith(kept)}
    complete = same_folder and theirs == "both"  # nothing is missing, and nothing is deleted
    assert files_of(folder) == (expected if complete else of_format)
    assert found.draw() == drawn
    assert same_folder or files_of(first.folder) == before


@pytest.mark.parametrize("place", ["samples.npz", "png/000004.png", "drawn.npz"])
@pytest.mark.parametrize("broken", ["gone", "empty", "cut"])
def test_broken_images_are_not_taken_over(stored, whole, tmp_path, drawn_batches, place, broken):
    format = "png" if place.startswith("png") else "npz"
    theirs = stored(tmp_path / "theirs", format=format)
    theirs.draw()
    path = theirs.folder / place
    content = path.read_bytes()
    path.write_bytes(b"" if broken == "empty" else content[: len(content) // 2])
    if broken == "gone":
        path.unlink()
    replace(stored(tmp_path / "ours"), others=(theirs.folder,)).draw()
    assert len(drawn_batches) == 2 * NUM_PARTS
    samples = (tmp_path / "ours" / "samples.npz").read_bytes()
    assert samples == (whole[0] / "samples.npz").read_bytes()


def test_images_that_are_being_replaced_are_not_taken_over(
    stored, whole, tmp_path, drawn_batches, monkeypatch
):
    """Another process begins to draw in their folder while they are copied."""
    theirs, link = stored(tmp_path / "theirs"), os.link
    theirs.draw()

    def replaced_meanwhile(source, target):
        link(source, target)
        (theirs.folder / "drawn.npz").unlink(missing_ok=True)

    monkeypatch.setattr(os, "link", replaced_meanwhile)
    replace(stored(tmp_path / "ours"), others=(theirs.folder,)).draw()
    assert len(drawn_batches) == 2 * NUM_PARTS
    assert files_of(tmp_path / "ours") == {"samples.npz": files_of(whole[0])["samples.npz"]}


def test_images_are_copied_where_files_have_one_name(stored, tmp_path, drawn_batches, monkeypatch):
    def no_links(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    theirs = stored(tmp_path / "theirs")
    drawn = theirs.draw()
    ours = replace(stored(tmp_path / "ours"), others=(theirs.folder,))
    assert ours.draw() == drawn
    assert files_of(ours.folder) == files_of(theirs.folder)
    assert len(drawn_batches) == NUM_PARTS


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


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from dmoe_var import DynamicVAR, Threshold, load_var, load_vqvae
from dmoe_var.sampling.draw import Drawing
from dmoe_var.sampling.store import StoredDrawing
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.distributed import start, stop

models, folder = sys.argv[1:]
torch.set_num_threads(1)
start(torch.device("cpu"))
model = DynamicVAR(load_var(models + "/dense"), load_var(models + "/moe"), (2, 3))
sampling = SamplingConfig(cfg=2.0, top_k=20, batch_size=3)
labels = np.arange(11) % 5
drawing = Drawing(model, load_vqvae(models + "/vqvae"), labels, 5, sampling, Threshold(0.3))
drawn = StoredDrawing(drawing, Path(folder), "f", "both").draw()
print(drawn.ran.times_NSK.tolist())
stop()
"""


def run_processes(tmp_path, models, folder, num_processes):
    """The script under `num_processes` processes, as torchrun starts them; what they print."""
    script = tmp_path / "draw.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).resolve().parents[2])
    common = {
        **os.environ, "PYTHONPATH": root, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(models), str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * num_processes
    return outputs


def test_two_processes_leave_what_one_does(tmp_path, tiny_models, whole):
    """Bitwise; and both know the experts that ran."""
    model, vqvae = tiny_models
    for name, each in (("dense", model.dense), ("moe", model.moe), ("vqvae", vqvae)):
        save_checkpoint(tmp_path / "models" / name, each)
    folder = tmp_path / "drawn"
    outputs = run_processes(tmp_path, tmp_path / "models", folder, 2)
    assert files_of(folder) == files_of(whole[0])
    assert outputs == [f"{whole[1].ran.times_NSK.tolist()}\n"] * 2


def test_counts_of_another_format_are_not_read(stored, drawn_batches):
    """A part, and a finished drawing, as versions before this one left them: drawn again."""
    ours = stored()
    ours._make_part(0)
    as_before(ours.folder / "parts/part_00000.npz")
    first = ours.draw()
    assert drawn_batches == [0, 0, 1, 2, 3]
    as_before(ours.folder / "drawn.npz")
    assert ours.draw().ran == first.ran
    assert drawn_batches == [0, 0, 1, 2, 3, 0, 1, 2, 3]


def as_before(path):
    """By image and scale the pairs, and what is charged for them, in the place of the times."""
    with np.load(path) as file:
        arrays = dict(file)
    times_NSK = arrays.pop("times")
    pairs_NS = times_NSK @ np.arange(times_NSK.shape[-1])
    write_npz(path, {**arrays, "pairs": pairs_NS, "charged": pairs_NS.astype(float)})
