"""The token cache: what the encoder says, made once, and never half."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.data import image_folder, token_cache, token_shards
from dmoe_var.data.digits import load_digits
from dmoe_var.data.pictures import UnreadablePictureError
from dmoe_var.data.token_cache import tokenize
from dmoe_var.errors import DataError

NUM_IMAGES, SHARD = 10, 4
NAMES = ["index.json", "labels.npy"] + [
    f"shard_0000{i}.{kind}" for i in range(3) for kind in ("json", "npy")
]


@pytest.fixture(scope="module")
def images():
    """A few digits, cut where a shard is not full."""
    digits = load_digits(8)[0]
    return replace(digits, images=digits.images[:NUM_IMAGES], labels=digits.labels[:NUM_IMAGES])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(token_shards, "SHARD_IMAGES", SHARD)


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
    """The files that follow from images and tokenizer, and the others without their times."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            found[path.name] = {**json.loads(path.read_text()), "seconds": None}
        elif not path.name.startswith("."):
            found[path.name] = path.read_bytes()
    return found


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


def test_batches_gather_from_all_shards(images, cached):
    tokens = cached(images)
    tokens_BL, labels_B = everything(tokens)
    for order in ([9, 0, 4, 3, 8, 4, 7], [5], [], [3, 4, 7, 8]):
        indices = torch.tensor(order, dtype=torch.long)
        ours_BL, ours_B = tokens.batch(indices)
        assert torch.equal(ours_BL, tokens_BL[indices])
        assert torch.equal(ours_B, labels_B[indices])
    with pytest.raises(IndexError):
        tokens.batch(torch.tensor([NUM_IMAGES]))


def test_files(images, cached, folder):
    """Shards of at most SHARD images, mapped, not loaded; checksums of what is on the disk."""
    tokens = cached(images)
    assert all(isinstance(shard, np.memmap) for shard in tokens.shards)
    assert [(shard.dtype, len(shard)) for shard in tokens.shards] == [
        (np.uint16, n) for n in (4, 4, 2)
    ]
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert np.load(folder / "labels.npy").tolist() == images.labels.tolist()
    for number, entry in enumerate(json.loads((folder / "index.json").read_text())["shards"]):
        path = folder / f"shard_{number:05d}.npy"
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_very_large_sets_make_no_more_files(monkeypatch, tmp_path):
    monkeypatch.undo()
    shards = token_shards.plan(tmp_path, 50 * 1_281_167)
    assert len(shards) <= token_shards.MOST_SHARDS
    assert (shards[0].first, shards[-1].last) == (0, 50 * 1_281_167)
    assert all(a.last == b.first for a, b in itertools.pairwise(shards))
    assert len(token_shards.plan(tmp_path, 1_281_167)) == 157


def test_images_are_encoded_once(images, cached, encoded):
    first = everything(cached(images))
    assert encoded == [3, 1, 3, 1, 2]
    assert torch.equal(everything(cached(images))[0], first[0])
    assert sum(encoded) == NUM_IMAGES


@pytest.mark.parametrize("options", [{"workers": 2}, {"batch_size": 64}, {"workers": 1}])
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


def test_interrupted_tokenisation_goes_on(images, cached, encoded, folder, tmp_path, monkeypatch):
    """Two of three shards were there: only the last one's images are encoded again."""
    whole = content(folder)
    shutil.rmtree(folder)
    encoded.clear()
    write, written = token_shards.Shard.write, []

    def write_twice(shard, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(shard, *arguments)

    monkeypatch.setattr(token_shards.Shard, "write", write_twice)
    with pytest.raises(KeyboardInterrupt):
        cached(images)
    monkeypatch.setattr(token_shards.Shard, "write", write)
    encoded.clear()
    cached(images)
    assert sum(encoded) == NUM_IMAGES - 2 * SHARD
    assert content(folder) == whole


START = """
import os, signal, sys, time
from pathlib import Path
import numpy as np, torch
from dmoe_var import load_vqvae
from dmoe_var.data import token_shards
from dmoe_var.data.digits import ImageSet
from dmoe_var.data.token_cache import tokenize

torch.set_num_threads(1)
folder = Path(sys.argv[1])
given = np.load(folder / "images.npz")
images = ImageSet(given["images"], given["labels"], 10, str(given["key"]))
token_shards.SHARD_IMAGES = 4
"""
KILLED = """
save, saved = np.save, []

def die(file, array, **options):
    saved.append(array)
    if len(saved) == 2:
        file.write(b"\\x93NUMPY\\x01\\x00")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, array, **options)

np.save = die
tokenize(images, load_vqvae(folder / "vqvae"), folder / "cache", batch_size=3, progress=False)
"""
AT_ONCE = """
first = os.fork() != 0
middle = folder / "middle"
write, encoded, vqvae = token_shards.Shard.write, [], load_vqvae(folder / "vqvae")
encode = vqvae.encode

def slow(shard, *arguments):
    write(shard, *arguments)
    if first and shard.number == 0:
        middle.touch()
        time.sleep(0.7)

def counted(images_B3RR):
    encoded.append(len(images_B3RR))
    return encode(images_B3RR)

token_shards.Shard.write, vqvae.encode = slow, counted
while not first and not middle.exists():
    time.sleep(0.01)
tokens = tokenize(images, vqvae, folder / "cache", batch_size=3, progress=not first)
tokens_BL, _ = tokens.batch(torch.arange(len(tokens)))
np.save(folder / f"tokens_{int(first)}.npy", tokens_BL.numpy())
os.write(1, f"{int(first)} {sum(encoded)}\\n".encode())  # at once: two processes write to it
if first:
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def in_a_fresh_python(program, images, vqvae, folder):
    """Runs a program after START, on these images and weights; its cache is folder/cache."""
    arrays = {"images": images.images, "labels": images.labels, "key": images.key}
    np.savez(folder / "images.npz", **arrays)
    save_checkpoint(folder / "vqvae", vqvae)
    command = [sys.executable, "-c", START + program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_runs_at_once(images, vqvae, cached, folder, tmp_path):
    """The second starts in the middle of the first: it waits, says so, and encodes nothing."""
    whole, (tokens_BL, _) = content(folder), everything(cached(images))
    shutil.rmtree(folder)
    ended = in_a_fresh_python(AT_ONCE, images, vqvae, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == ["0 0", f"1 {NUM_IMAGES}"]
    said = rf"waiting for another run \(process \d+ on .+\), at {re.escape(str(folder))}\n"
    assert re.match(said, ended.stderr)
    assert content(folder) == whole
    for number in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"tokens_{number}.npy"), tokens_BL.numpy())


def test_a_cache_that_is_only_read(images, vqvae, cached, folder, monkeypatch):
    """As another user's: there is nothing to lock."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert torch.equal(everything(cached(images))[0], direct(images, vqvae, torch.arange(10)))
    assert not (folder / ".lock").exists()


def test_killed_in_the_middle_of_a_file(images, vqvae, cached, folder, tmp_path):
    """SIGKILL while the second shard is half written; started again: bitwise the same files."""
    whole = content(folder)
    shutil.rmtree(folder)
    ended = in_a_fresh_python(KILLED, images, vqvae, tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    partial = sorted(path.name for path in folder.iterdir())
    assert partial[1].startswith(".shard_00001.npy.")
    assert [partial[0], *partial[2:]] == [".lock", "shard_00000.json", "shard_00000.npy"]
    cached(images)
    assert content(folder) == whole


@pytest.mark.parametrize("gone", NAMES)
def test_a_file_that_is_gone_is_made_again(images, cached, encoded, folder, gone):
    whole = content(folder)
    (folder / gone).unlink()
    encoded.clear()
    cached(images)
    assert sum(encoded) == ({"0": 4, "1": 4, "2": 2}[gone[10]] if "shard" in gone else 0)
    assert content(folder) == whole


def test_an_empty_folder_is_filled(images, cached, folder):
    whole = content(folder)
    for path in folder.iterdir():
        path.unlink()
    cached(images)
    assert content(folder) == whole


def test_nothing_vouches_for_what_is_being_made_again(images, cached, folder, monkeypatch):
    """Interrupted when new tokens are there: no checksum of the old ones is left to trust."""

    def interrupted(path, content):
        raise KeyboardInterrupt

    (folder / "shard_00001.npy").unlink()
    monkeypatch.setattr(token_shards, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(images)
    assert (folder / "shard_00001.npy").exists()
    assert not (folder / "shard_00001.json").exists()
    assert not (folder / "index.json").exists()


# Broken


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def emptied(path):
    path.write_bytes(b"")


def with_more_rows(path):
    np.save(path, np.zeros((5, 30), np.uint16))


def of_another_type(path):
    np.save(path, np.zeros((4, 30), np.int64))


def with_objects(path):
    np.save(path, np.array([{}], object), allow_pickle=True)


def with_another_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("shard_00001.npy", cut_short, "cut short"),
        ("shard_00001.npy", emptied, "cut short"),
        ("shard_00001.npy", with_objects, "cut short or no .npy file"),
        ("shard_00001.npy", with_more_rows, r"holds uint16 \(5, 30\), expected uint16 \(4, 30\)"),
        ("shard_00001.npy", of_another_type, r"holds int64 \(4, 30\)"),
        ("shard_00001.npy", with_another_bit, "changed since it was written"),
        ("shard_00001.json", cut_short, "Invalid JSON"),
        ("index.json", cut_short, "Invalid JSON"),
        ("index.json", emptied, "Invalid JSON"),
        ("labels.npy", cut_short, "cut short"),
        ("labels.npy", with_another_bit, "not the labels"),
    ],
)
def test_broken_cache(images, cached, folder, name, harm, message):
    path, whole = folder / name, content(folder)
    harm(path)
    with pytest.raises(DataError, match=f"{path}: .*{message}.*remove it") as caught:
        cached(images)
    assert "\n" not in str(caught.value)
    path.unlink()  # as the message says
    cached(images)
    assert content(folder) == whole


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("index.json", "format", "other/1", "of .*other/1.*expected .*dmoe-var-tokens"),
        ("index.json", "num_tokens", 31, "expected .*30"),
        ("index.json", "left_out", [3], "10 rows and 1 images left out, expected 10"),
        ("index.json", "seconds", {"decoding": 1.0}, "seconds.decoding: "),
        ("index.json", "sha", 1, "sha: "),
        ("shard_00002.json", "first", 7, r"of images 7..9 or others, expected 8..9"),
        (
            "shard_00002.json",
            "unreadable",
            [{"index": 0, "path": "", "reason": ""}],
            r"expected 8..9",
        ),
    ],
)
def test_inconsistent_cache(images, cached, folder, name, key, value, message):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError, match=f"{path}: .*{message}.*remove it") as caught:
        cached(images)
    assert "\n" not in str(caught.value)


def test_labels_of_other_images(images, cached, folder):
    """The key names the content; one that does not is found out by its labels."""
    with pytest.raises(DataError, match="not the labels of these images"):
        cached(replace(images, labels=images.labels[::-1].copy()))


# Unreadable pictures


@pytest.fixture
def pictures(tmp_path, make_folder, folder_images):
    """pictures(broken=(names), **keys) -> training pictures a/00.png..., some broken.

    Six pictures of two classes, two crops each: shards of images 0-3, 4-7 and 8-11.
    """

    def pictures(*broken, **fields):
        root = make_folder(tmp_path / "pictures", train=(4, 2), val=(1, 1))
        for name in broken:
            (root / "train" / name).write_bytes(b"no picture, but of some length")
        return folder_images(root, augmentations=2, **fields)[0]

    return pictures


BROKEN = ("a/01.png", "b/00.png", "b/01.png")  # images 2 3, 8 9 and 10 11: a whole shard


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pictures_have_no_rows(pictures, vqvae, cached, tmp_path, workers):
    images = pictures(*BROKEN)
    tokens = cached(images, unreadable="skip", workers=workers)
    kept = torch.tensor([0, 1, 4, 5, 6, 7])
    tokens_BL, labels_B = everything(tokens)
    assert torch.equal(tokens_BL, direct(images, vqvae, kept))
    assert labels_B.tolist() == [0] * 6
    assert (tokens.about.images, tokens.about.unreadable) == (6, 3)
    assert [len(shard) for shard in tokens.shards] == [2, 4, 0]
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
    assert f"all in {folder}/unreadable.txt" in message
    assert "data.unreadable=skip" in message
    assert "\n" not in message
    assert len((folder / "unreadable.txt").read_text().splitlines()) == 3


def test_labels_are_those_of_the_pictures_that_are_left(pictures, vqvae, cached):
    """Left-out pictures in the middle of either class: every row has its own picture's label."""
    images = pictures("a/01.png", "b/00.png")
    tokens_BL, labels_B = everything(cached(images, unreadable="skip"))
    kept = torch.tensor([0, 1, 4, 5, 6, 7, 10, 11])
    assert torch.equal(tokens_BL, direct(images, vqvae, kept))
    assert labels_B.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    one_by_one = [cached(images, unreadable="skip").batch(torch.tensor([i]))[1] for i in range(8)]
    assert torch.cat(one_by_one).tolist() == images.labels[kept.numpy()].tolist()


def test_refused_pictures_are_tried_again(pictures, cached, encoded, tmp_path, monkeypatch):
    """What kept them from being read is gone; shards without such pictures are kept."""
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
from dmoe_var import load_vqvae
from dmoe_var.data import DataConfig, load_data, token_shards
from dmoe_var.data.token_cache import tokenize
from dmoe_var.training import distributed

folder = Path(sys.argv[1])
distributed.start(torch.device("cpu"))
torch.set_num_threads(1)
token_shards.SHARD_IMAGES, vqvae = 4, load_vqvae(folder / "vqvae")
root = str(folder / "pictures")
images, _ = load_data(DataConfig("image_folder", image_size=8, root=root, augmentations=2))
made, write = [], token_shards.Shard.write
token_shards.Shard.write = lambda shard, *a: made.append(shard.number) or write(shard, *a)
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
def test_processes_share_the_shards(pictures, vqvae, cached, tmp_path):
    """Two processes, as torchrun starts them: each its shards, the same error, the same files."""
    cached(pictures("a/01.png"), unreadable="skip")
    save_checkpoint(tmp_path / "vqvae", vqvae)
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, str(script), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert said[0].startswith("[0, 2] 10 1 unreadable pictures, first ")
    assert said[1] == said[0].replace("[0, 2]", "[1]")
    (shared,), (alone,) = (tmp_path / "shared").iterdir(), (tmp_path / "cache").iterdir()
    assert content(shared) == content(alone)


def test_a_rank_without_shards_makes_none(images, vqvae, tmp_path, monkeypatch):
    """More processes than shards: the others' shards are left to them."""
    monkeypatch.setattr(token_cache, "world_size", lambda: 5)
    monkeypatch.setattr(token_cache, "rank", lambda: 4)
    with pytest.raises(DataError, match="cannot be read"):
        tokenize(images, vqvae, tmp_path, progress=False)
    (folder,) = tmp_path.iterdir()
    assert list(folder.iterdir()) == []
