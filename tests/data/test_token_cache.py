"""The token cache: what the encoder says, made once, and never half."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.data import image_folder, token_cache
from dmoe_var.data.digits import load_digits
from dmoe_var.data.pictures import UnreadablePictureError
from dmoe_var.data.token_cache import tokenize
from dmoe_var.errors import DataError

NUM_IMAGES, BLOCK = 10, 4


@pytest.fixture(scope="module")
def images():
    """A few digits, cut where a block is not full."""
    digits = load_digits(8)[0]
    return replace(digits, images=digits.images[:NUM_IMAGES], labels=digits.labels[:NUM_IMAGES])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_IMAGES", BLOCK)


@pytest.fixture
def vqvae(make_vqvae):
    return make_vqvae()


@pytest.fixture
def encoded(vqvae, monkeypatch):
    """How many images each call of `encode` has got."""
    calls, encode = [], vqvae.encode

    def counted(images_B3RR):
        calls.append(len(images_B3RR))
        return encode(images_B3RR)

    monkeypatch.setattr(vqvae, "encode", counted)
    return calls


@pytest.fixture
def cached(vqvae, tmp_path):
    """cached(images, **options) -> their token set, in one cache."""

    def cached(images, **options):
        options = {"batch_size": 3, "progress": False, **options}
        return tokenize(images, vqvae, tmp_path / "cache", **options)

    return cached


@pytest.fixture
def folder(cached, images, tmp_path):
    """A finished cache of `images`."""
    cached(images)
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def direct(images, vqvae, indices):
    return torch.cat(vqvae.encode(images.tensors(indices)), dim=1)


def everything(tokens):
    return tokens.batch(torch.arange(len(tokens)))


def content(folder):
    """The rows, the report, and what the journals say but for times."""
    found = {path.name: path.read_bytes() for path in folder.glob("[!.j]*")}
    lines = [line for path in folder.glob("journal_*") for line in path.read_text().splitlines()]
    journalled = [{**json.loads(line), "seconds": None} for line in lines]
    return {**found, "journal": sorted(journalled, key=lambda line: line["first"])}


# What it holds


def test_tokens_are_those_of_the_encoder(images, vqvae, cached):
    tokens = cached(images)
    tokens_BL, labels_B = everything(tokens)
    assert torch.equal(tokens_BL, direct(images, vqvae, torch.arange(NUM_IMAGES)))
    assert (tokens_BL.dtype, labels_B.dtype) == (torch.long, torch.long)
    assert labels_B.tolist() == images.labels.tolist()
    scales = vqvae.encode(images.tensors(torch.arange(NUM_IMAGES)))
    for ours, theirs in zip(tokens.by_scale(tokens_BL), scales, strict=True):
        assert torch.equal(ours, theirs)
    assert len(tokens) == NUM_IMAGES
    assert isinstance(tokens.tokens_NL, np.memmap)
    assert tokens.tokens_NL.dtype == np.uint16


def test_batches_gather_from_all_blocks(images, cached):
    tokens = cached(images)
    tokens_BL, labels_B = everything(tokens)
    for order in ([9, 0, 4, 3, 8, 4, 7], [5], [], [3, 4, 7, 8]):
        indices = torch.tensor(order, dtype=torch.long)
        ours_BL, ours_B = tokens.batch(indices)
        assert torch.equal(ours_BL, tokens_BL[indices])
        assert torch.equal(ours_B, labels_B[indices])
    with pytest.raises(IndexError):
        tokens.batch(torch.tensor([NUM_IMAGES]))


def test_images_are_encoded_once(images, cached, encoded):
    first = everything(cached(images))
    assert encoded == [3, 1, 3, 1, 2]
    assert torch.equal(everything(cached(images))[0], first[0])
    assert sum(encoded) == NUM_IMAGES


@pytest.mark.parametrize("options", [{"workers": 2}, {"batch_size": 64}])
def test_neither_workers_nor_batches_matter(images, vqvae, folder, tmp_path, options):
    state = torch.get_rng_state()
    tokenize(images, vqvae, tmp_path / "other", progress=False, **options)
    assert torch.equal(torch.get_rng_state(), state)
    (other,) = (tmp_path / "other").iterdir()
    assert content(other) == content(folder)


def test_another_tokenizer_or_other_images_get_another_folder(images, vqvae, make_vqvae, tmp_path):
    tokenize(images, vqvae, tmp_path, progress=False)
    tokenize(images, make_vqvae(), tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        vqvae.quantize.embedding.weight[0, 0] += 1
    tokenize(images, vqvae, tmp_path, progress=False)
    tokenize(replace(images, key="others"), vqvae, tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 3


def test_vocabulary_that_does_not_fit(images, make_vqvae, tmp_path):
    vqvae = make_vqvae(vocab_size=2**16 + 1, z_channels=1)
    with pytest.raises(DataError, match="vocab_size=65537: the token cache holds uint16"):
        tokenize(images, vqvae, tmp_path, progress=False)


def test_times_are_of_what_they_say(images, vqvae, cached, monkeypatch):
    """Each call of the clock is a tick: between two of them, whatever is done takes one second,
    but a decoder ticks 10 times and an encoder 100 times in between."""
    clock = iter(range(10**9))
    ticks = lambda n: [next(clock) for _ in range(n)]  # noqa: E731
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    decode, encode = type(images).decode, vqvae.encode
    monkeypatch.setattr(type(images), "decode", lambda *a: ticks(9) and decode(*a))
    monkeypatch.setattr(vqvae, "encode", lambda x: ticks(99) and encode(x))
    about = cached(images).about
    assert (about.images, about.unreadable) == (NUM_IMAGES, 0)
    assert about.seconds.decode == 5 * 10
    assert about.seconds.encode == 5 * 100
    assert about.seconds.wait == 5 * (10 + 2)


# Interrupted


@pytest.mark.parametrize("after", ["rows", "journal"])
def test_interrupted_tokenisation_goes_on(
    images, cached, encoded, folder, tmp_path, monkeypatch, after
):
    """Two of three blocks were written, the second perhaps not in the journal: only what is
    missing is encoded again."""
    whole = content(folder)
    shutil.rmtree(folder)
    line, calls = token_cache._line, []

    def stopped(written):
        calls.append(written)
        if len(calls) == (2 if after == "rows" else 3):
            raise KeyboardInterrupt
        return line(written)

    monkeypatch.setattr(token_cache, "_line", stopped)
    with pytest.raises(KeyboardInterrupt):
        cached(images)
    monkeypatch.setattr(token_cache, "_line", line)
    encoded.clear()
    cached(images)
    assert sum(encoded) == NUM_IMAGES - (BLOCK if after == "rows" else 2 * BLOCK)
    assert content(folder) == whole


def test_two_runs_at_once(images, vqvae, cached, encoded, tmp_path, monkeypatch):
    """The second asks for the cache in the middle of the first: it waits, and encodes nothing."""
    line, alone, middle, asked = token_cache._line, token_cache.alone, Event(), Event()

    def slow(written):
        middle.set()
        assert asked.wait(60)
        return line(written)

    def asking(folder):
        if middle.is_set():
            asked.set()
        return alone(folder)

    monkeypatch.setattr(token_cache, "_line", slow)
    monkeypatch.setattr(token_cache, "alone", asking)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(cached, images)
        assert middle.wait(60)
        others_BL, _ = everything(cached(images))
    assert sum(encoded) == NUM_IMAGES
    assert torch.equal(everything(first.result())[0], others_BL)


def test_killed_in_the_middle_of_a_line(images, cached, folder):
    """SIGKILL while the second block's line is half written; started again: bitwise the same."""
    whole = content(folder)
    shutil.rmtree(folder)

    def killed():
        torch.set_num_threads(1)
        line, calls = token_cache._line, []

        def die(written):
            calls.append(written)
            if len(calls) == 2:
                with (folder / "journal_0.jsonl").open("a") as file:
                    file.write(line(written)[:20])
                os.kill(os.getpid(), signal.SIGKILL)
            return line(written)

        token_cache._line = die
        cached(images)

    child = multiprocessing.get_context("fork").Process(target=killed, daemon=True)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert len((folder / "journal_0.jsonl").read_text().splitlines()[1]) == 20
    cached(images)
    assert content(folder) == whole


@pytest.mark.parametrize("gone", ["tokens.npy", "journal_0.jsonl"])
def test_a_file_that_is_gone_is_made_again(images, cached, encoded, folder, gone):
    whole = content(folder)
    (folder / gone).unlink()
    encoded.clear()
    cached(images)
    assert sum(encoded) == NUM_IMAGES
    assert content(folder) == whole


# Broken


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def with_more_rows(path):
    np.save(path, np.zeros((11, 30), np.uint16))


def in_another_order(path):
    np.save(path, np.asfortranarray(np.load(path)))


def with_objects(path):
    np.save(path, np.array([{}], object), allow_pickle=True)


def with_another_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def with_another_image_left_out(path):
    line = '"unreadable":[{"index":9,"path":"","reason":""}]'
    path.write_text(path.read_text().replace('"unreadable":[]', line))


def without_its_end(path):
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    ("name", "harm", "blocks"),
    [
        ("tokens.npy", cut_short, 3),
        ("tokens.npy", with_objects, 3),
        ("tokens.npy", with_more_rows, 3),
        ("tokens.npy", in_another_order, 3),
        ("tokens.npy", with_another_bit, 1),
        ("journal_0.jsonl", with_another_image_left_out, 3),
        ("journal_0.jsonl", without_its_end, None),
    ],
)
def test_a_damaged_cache_is_made_anew(images, cached, encoded, folder, capsys, name, harm, blocks):
    """What is damaged, and no more; one line says so, but for what an interrupted run leaves."""
    whole = content(folder)
    harm(folder / name)
    encoded.clear()
    capsys.readouterr()
    cached(images)
    assert content(folder) == whole
    assert sum(encoded) == (NUM_IMAGES if blocks == 3 else 2)
    line = f"{folder}: damaged; {blocks} of 3 blocks are made anew\n"
    assert capsys.readouterr().err == (line if blocks else "")


# Unreadable pictures


@pytest.fixture
def pictures(tmp_path, make_folder, folder_images):
    """pictures(broken=(names), **keys) -> training pictures a/00.png..., some broken.

    Six pictures of two classes, two crops each: blocks of images 0-3, 4-7 and 8-11.
    """

    def pictures(*broken, **fields):
        root = make_folder(tmp_path / "pictures", train=(4, 2), val=(1, 1))
        for name in broken:
            (root / "train" / name).write_bytes(b"no picture, but of some length")
        return folder_images(root, augmentations=2, **fields)[0]

    return pictures


BROKEN = ("a/01.png", "b/00.png", "b/01.png")  # images 2 3, 8 9 and 10 11: a whole block


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pictures_have_no_rows(pictures, vqvae, cached, tmp_path, workers):
    images = pictures(*BROKEN)
    tokens = cached(images, unreadable="skip", workers=workers)
    kept = torch.tensor([0, 1, 4, 5, 6, 7])
    tokens_BL, labels_B = everything(tokens)
    assert torch.equal(tokens_BL, direct(images, vqvae, kept))
    assert labels_B.tolist() == [0] * 6
    assert (tokens.about.images, tokens.about.unreadable) == (6, 3)
    (folder,) = (tmp_path / "cache").iterdir()
    lines = (folder / "unreadable.txt").read_text().splitlines()
    paths, reasons = zip(*(line.split("\t") for line in lines), strict=True)
    assert paths == tuple(f"{tmp_path}/pictures/train/{name}" for name in BROKEN)
    assert all(reason == "of no format that Pillow knows" for reason in reasons)


def test_refused_once_all_have_been_seen(pictures, cached, encoded, tmp_path):
    images = pictures(*BROKEN)
    with pytest.raises(DataError) as caught:
        cached(images)
    assert sum(encoded) == 6
    (folder,) = (tmp_path / "cache").iterdir()
    message = str(caught.value)
    assert message.startswith(f"3 unreadable pictures, first {images.path(2)} (of no format")
    assert message.endswith(f"all in {folder}/unreadable.txt; data.unreadable=skip leaves them out")
    assert len((folder / "unreadable.txt").read_text().splitlines()) == 3


def test_labels_are_those_of_the_pictures_that_are_left(pictures, vqvae, cached):
    """Left-out pictures in the middle of either class: every row has its own picture's label."""
    images = pictures("a/01.png", "b/00.png")
    tokens_BL, labels_B = everything(cached(images, unreadable="skip"))
    kept = torch.tensor([0, 1, 4, 5, 6, 7, 10, 11])
    assert torch.equal(tokens_BL, direct(images, vqvae, kept))
    assert labels_B.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_refused_pictures_are_tried_again(pictures, cached, encoded, tmp_path, monkeypatch):
    """What kept them from being read is gone; blocks without such pictures are kept."""
    images = pictures()

    def opened(path, open_rgb=image_folder.open_rgb):
        if path.parent.name == "b" and path.name == "00.png":
            raise UnreadablePictureError(path, "the disk is gone")
        return open_rgb(path)

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "open_rgb", opened)
        with pytest.raises(DataError, match="the disk is gone"):
            cached(images)
        assert len(cached(images, unreadable="skip")) == 10
        with pytest.raises(DataError):
            cached(images)
    encoded.clear()
    tokens = cached(images)
    assert (len(tokens), sum(encoded)) == (12, 4)
    (folder,) = (tmp_path / "cache").iterdir()
    assert not (folder / "unreadable.txt").exists()


def test_pictures_of_the_same_names_and_sizes(pictures, vqvae, cached, tmp_path):
    """Other content in their place: other tokens, from one cache."""
    first = pictures()
    tokens_BL, _ = everything(cached(first))
    for part in ("a", "b"):
        for path in (tmp_path / "pictures" / "train" / part).iterdir():
            size = path.stat().st_size
            Image.effect_noise((13, 11), 90).save(path)
            path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))  # after the end of it
    second = replace(first)
    others_BL, _ = everything(cached(second))
    assert not torch.equal(others_BL, tokens_BL)
    assert torch.equal(others_BL, direct(second, vqvae, torch.arange(12)))
    assert cached(second).about.data["content"] == second.key != first.key


@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_all_unreadable(pictures, cached, tmp_path, policy):
    names = [f"a/0{i}.png" for i in range(4)] + ["b/00.png", "b/01.png"]
    with pytest.raises(DataError, match=r"^6 pictures, all unreadable, first .*a/00.png") as caught:
        cached(pictures(*names), unreadable=policy)
    assert "data.unreadable" not in str(caught.value)


# Several processes


PROCESS = """
import sys
from pathlib import Path
import torch
from dmoe_var import distributed, load_vqvae
from dmoe_var.data import DataConfig, load_data, token_cache
from dmoe_var.data.token_cache import tokenize

folder = Path(sys.argv[1])
distributed.start(torch.device("cpu"))
torch.set_num_threads(1)
token_cache.BLOCK_IMAGES, vqvae = 4, load_vqvae(folder / "vqvae")
root = str(folder / "pictures")
images, _ = load_data(DataConfig("image_folder", image_size=8, root=root, augmentations=2))
made, line = [], token_cache._line
token_cache._line = lambda written: made.append(written.first) or line(written)
options = {"batch_size": 3, "progress": False}
try:
    tokenize(images, vqvae, folder / "shared", **options)
except ValueError as error:
    message = str(error)
tokens = tokenize(images, vqvae, folder / "shared", unreadable="skip", **options)
said = f"{made} {len(tokens)} {message}"
(folder / f"rank{distributed.rank()}").write_text(said)
distributed.stop()
"""


@pytest.mark.slow
def test_processes_share_the_blocks(pictures, vqvae, cached, tmp_path):
    """Two processes, as torchrun starts them: each its blocks, the same error, the same content."""
    cached(pictures("a/01.png"), unreadable="skip")
    save_checkpoint(tmp_path / "vqvae", vqvae)
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, str(script), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert said[0].startswith("[0, 8] 10 1 unreadable pictures, first ")
    assert said[1] == said[0].replace("[0, 8]", "[4]")
    (shared,), (alone,) = (tmp_path / "shared").iterdir(), (tmp_path / "cache").iterdir()
    assert content(shared) == content(alone)
