"""The token cache: what the encoder says, made once, and never half."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmoe_var.data import token_cache
from dmoe_var.data.digits import load_digits
from dmoe_var.data.token_cache import tokenize
from dmoe_var.errors import DataError

NUM_IMAGES, SHARD = 10, 4
FILES = ["about.json", "tokens.npy"]


@pytest.fixture(scope="module")
def images():
    """A few digits, cut where a shard is not full."""
    digits = load_digits(8)[0]
    return replace(digits, images=digits.images[:NUM_IMAGES], labels=digits.labels[:NUM_IMAGES])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(token_cache, "SHARD", SHARD)


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


def folders(cache):
    return sorted(path.name for path in cache.iterdir())


def test_tokens_are_those_of_the_encoder(images, vqvae, tmp_path):
    cached = tokenize(images, vqvae, tmp_path, batch_size=3, progress=False)
    direct = vqvae.encode(images.tensors(torch.arange(NUM_IMAGES)))
    tokens_BL, labels_B = cached.batch(torch.arange(NUM_IMAGES))
    assert torch.equal(tokens_BL, torch.cat(direct, dim=1))
    assert tokens_BL.dtype == torch.long
    assert labels_B.tolist() == images.labels.tolist()
    for ours, theirs in zip(cached.by_scale(tokens_BL), direct, strict=True):
        assert torch.equal(ours, theirs)
    chosen = torch.tensor([7, 2])
    assert torch.equal(cached.batch(chosen)[0], tokens_BL[chosen])
    assert isinstance(cached.tokens_NL, np.memmap)
    assert cached.tokens_NL.dtype == np.uint16
    assert len(cached) == NUM_IMAGES


def test_images_are_encoded_once(images, vqvae, encoded, tmp_path):
    first = tokenize(images, vqvae, tmp_path, batch_size=3, progress=False)
    assert sum(encoded) == NUM_IMAGES
    second = tokenize(images, vqvae, tmp_path, batch_size=3, progress=False)
    assert sum(encoded) == NUM_IMAGES
    assert np.array_equal(first.tokens_NL, second.tokens_NL)
    (folder,) = tmp_path.iterdir()
    assert folders(folder) == FILES


def test_interrupted_tokenisation_goes_on(images, vqvae, encoded, tmp_path, monkeypatch):
    """Two of three shards were there: only the last one's images are encoded again."""
    whole = tokenize(images, vqvae, tmp_path / "whole", progress=False)
    save, saved = token_cache._save, []

    def save_twice(path, array):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, array)

    monkeypatch.setattr(token_cache, "_save", save_twice)
    with pytest.raises(KeyboardInterrupt):
        tokenize(images, vqvae, tmp_path / "parts", progress=False)
    monkeypatch.setattr(token_cache, "_save", save)
    encoded.clear()
    parts = tokenize(images, vqvae, tmp_path / "parts", progress=False)
    assert encoded == [NUM_IMAGES - 2 * SHARD]
    assert np.array_equal(parts.tokens_NL, whole.tokens_NL)
    assert folders(saved[0].parent) == FILES


def test_a_half_written_shard_does_not_count(images, vqvae, encoded, tmp_path):
    whole = tokenize(images, vqvae, tmp_path / "whole", progress=False)
    (folder,) = (tmp_path / "whole").iterdir()
    partial = tmp_path / "parts" / folder.name
    partial.mkdir(parents=True)
    (partial / ".shard_00000000.npy.tmp").write_bytes(b"\x93NUMPY")
    parts = tokenize(images, vqvae, tmp_path / "parts", progress=False)
    assert np.array_equal(parts.tokens_NL, whole.tokens_NL)


def test_another_tokenizer_or_other_images_get_another_folder(images, vqvae, make_vqvae, tmp_path):
    tokenize(images, vqvae, tmp_path, progress=False)
    tokenize(images, make_vqvae(), tmp_path, progress=False)
    assert len(folders(tmp_path)) == 1
    with torch.no_grad():
        vqvae.quantize.embedding.weight[0, 0] += 1
    tokenize(images, vqvae, tmp_path, progress=False)
    tokenize(replace(images, key="others"), vqvae, tmp_path, progress=False)
    assert len(folders(tmp_path)) == 3


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def emptied(path):
    path.write_bytes(b"")


def of_other_images(path):
    np.save(path, np.zeros((NUM_IMAGES + 1, 30), np.uint16))


def of_another_type(path):
    np.save(path, np.zeros((NUM_IMAGES, 30), np.int64))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_short, "cut short"),
        (emptied, "cut short"),
        (of_other_images, r"holds uint16 \(11, 30\), expected uint16 \(10, 30\)"),
        (of_another_type, "holds int64"),
    ],
)
def test_broken_cache(images, vqvae, tmp_path, harm, message):
    tokenize(images, vqvae, tmp_path, progress=False)
    (folder,) = tmp_path.iterdir()
    path = folder / "tokens.npy"
    harm(path)
    with pytest.raises(DataError, match=f"{path}: .*{message}.*remove it") as caught:
        tokenize(images, vqvae, tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_vocabulary_that_does_not_fit(images, make_vqvae, tmp_path):
    vqvae = make_vqvae(vocab_size=2**16 + 1, z_channels=1)
    with pytest.raises(DataError, match="vocab_size=65537: the token cache holds uint16"):
        tokenize(images, vqvae, tmp_path, progress=False)
