"""Points of a curve and pictures, on the tiny experiment (its distance is a fake, see conftest)."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.svm import SVC

from dmoe_var.data import load_data
from dmoe_var.data.digits import load_digits
from dmoe_var.errors import ConfigError, DataError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import StageResult, record_if_done, run_stage
from dmoe_var.experiment.record import Record
from dmoe_var.files import note
from dmoe_var.metrics.fidelity import Fidelity
from dmoe_var.moe.experts import PATHS
from dmoe_var.sampling.draw import Drawing
from dmoe_var.sampling.sampler import generate
from dmoe_var.sampling.store import StoredDrawing
from dmoe_var.stages import evaluate
from dmoe_var.stages.evaluate import MEASURING, Bench, describe
from dmoe_var.stages.parts import loaded


@pytest.fixture(scope="module")
def evaluated(make_experiment, kept_runs):
    """A run folder with a point, and its record; not to be written to."""
    return kept_runs, run_stage(make_experiment(kept_runs), "evaluate")


@pytest.fixture
def point(evaluated, tmp_path):
    """A run folder in which a point is done, and its record."""
    return shutil.copytree(evaluated[0], tmp_path / "point"), evaluated[1]


def test_a_point(make_experiment, runs):
    """Its samples lie beside its record, and any of them can be drawn again from it. Sampling time
    and every FLOP part are numbers with their unit in the name."""
    experiment = make_experiment(runs, {"selection.tau": [0.3, 0.6], "evaluate.seed": 4})
    record = run_stage(experiment, "evaluate")
    assert Record.read(experiment.folder("evaluate") / "result.json") == record
    assert {"flops_gmac", "sampling_ms_per_image", "fid_fake"} <= record.metrics.keys()
    assert all(np.isfinite(value) for value in record.metrics.values())
    assert record.num_samples == 20
    histogram = dict(record.about["flops_histogram"])
    edges, images = histogram["edges_gmac"], histogram["images"]
    assert (len(edges), len(images), sum(images)) == (21, 20, 20)
    assert edges[0] == pytest.approx(record.metrics["flops_gmac_min"])
    assert edges[-1] == pytest.approx(record.metrics["flops_gmac_max"])
    assert set(record.about["experts_ran_by"]) <= set(PATHS)
    told = {"flops_histogram", "experts_ran_by"}
    assert {k: v for k, v in record.about.items() if k not in told} == {
        "guidance": True,
        "samples": "samples.npz",
        "fidelity": "fid_fake",
        "fidelity_weights_sha256": "0" * 64,
        "reference": f"training images ({Bench(experiment).training_images.key})",
        "reference_images": 40,
    }
    assert 0 <= record.metrics["label_agreement"] <= 1
    assert 0 < record.metrics["experts_share_scale3"] < 1
    with np.load(experiment.folder("evaluate") / "samples.npz") as samples:
        images, labels, seeds = (samples[name] for name in ("arr_0", "labels", "seeds"))
    assert images.shape == (20, 8, 8, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [*range(10)] * 2
    assert seeds.tolist() == [4] * 20
    again = generate(
        loaded.dynamic(experiment), loaded.vqvae(experiment), [int(labels[13])],
        seed=4, start_index=13, tau=[0.3, 0.6],
    )  # fmt: skip
    difference = again[0].permute(1, 2, 0).numpy() * 255 - images[13]
    assert np.abs(difference).max() < 0.51


@pytest.fixture
def drawn_batches(monkeypatch):
    """The numbers of the batches that were drawn."""
    numbers, batch = [], Drawing.batch

    def counted(self, number):
        numbers.append(number)
        return batch(self, number)

    monkeypatch.setattr(Drawing, "batch", counted)
    return numbers


def test_images_outlive_a_failed_measurement(make_experiment, runs, drawn_batches, monkeypatch):
    """Nothing is drawn again, and the time that drawing took is kept."""

    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Fidelity, "score", fail)
        with pytest.raises(MemoryError):
            run_stage(make_experiment(runs), "evaluate")
    assert drawn_batches == [0, 1, 2]
    record = run_stage(make_experiment(runs), "evaluate")
    assert drawn_batches == [0, 1, 2]
    assert record.metrics["sampling_ms_per_image"] > 0
    assert 0 < record.metrics["experts_share_scale3"] <= 1


def test_a_wrong_reference_ends_the_run_before_it_draws(
    make_experiment, runs, drawn_batches, tmp_path
):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(7))
    experiment = make_experiment(runs, {"fidelity.reference": str(tmp_path / "reference.npz")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "Fidelity", Fidelity)
        with pytest.raises(DataError, match=r"reference\.npz"):
            run_stage(experiment, "evaluate")
    assert drawn_batches == []


# What is compared, by content


@pytest.fixture
def pictures(tmp_path):
    """pictures(seed) -> a folder of noise in two classes, always of the same names and sizes."""

    def pictures(seed, name="reference"):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
        for i, image in enumerate(noise):
            path = tmp_path / name / f"class_{i % 2}" / f"{i}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        return tmp_path / name

    return pictures


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_another_content_of_the_reference_is_measured_anew(
    make_experiment, runs, pictures, tmp_path, drawn_batches, images_of, kind
):
    """Overwritten in place, with the names and sizes that it had, and no image is drawn again.
    Where it is not at hand, as on a laptop that draws figures, the record is read as it is."""

    def write(seed):
        path = pictures(seed)
        if kind == "folder":
            return path
        images = [np.asarray(Image.open(each)) for each in sorted(path.rglob("*.bmp"))]
        np.savez(tmp_path / "reference.npz", arr_0=np.stack(images))
        return tmp_path / "reference.npz"

    path = write(0)
    experiment = make_experiment(runs, {"fidelity.reference": str(path)})
    first = run_stage(experiment, "evaluate")
    assert run_stage(experiment, "evaluate") == first
    write(1)
    assert record_if_done(experiment, "evaluate") is None
    second = run_stage(experiment, "evaluate")
    assert drawn_batches == [0, 1, 2]
    for record in (first, second):
        assert record.weights["fidelity.reference"] == record.about["reference_sha256"]
    assert first.about["reference_sha256"] != second.about["reference_sha256"]
    assert first.fingerprint != second.fingerprint
    reference = [np.asarray(Image.open(p)) for p in sorted(pictures(1).rglob("*.bmp"))]
    shown = images_of(experiment.folder("evaluate") / "samples.npz")
    assert second.metrics["fid_fake"] == pytest.approx(abs(shown.mean() - np.mean(reference)))
    write(0)
    again = run_stage(experiment, "evaluate")
    assert again.metrics["fid_fake"] == first.metrics["fid_fake"]
    assert again.fingerprint == first.fingerprint
    path.rename(tmp_path / "away")
    assert record_if_done(experiment, "evaluate") == again
    (tmp_path / "away").rename(path)
    next(pictures(0).rglob("*.bmp")).unlink()
    assert (record_if_done(experiment, "evaluate") is None) == (kind == "folder")


def test_other_training_images_are_measured_anew(
    make_experiment, point, drawn_batches, monkeypatch
):
    runs, first = point
    experiment = make_experiment(runs)
    training, held_out = load_data(experiment.config.data)
    others = replace(training, images=255 - training.images, key="others")
    monkeypatch.setattr("dmoe_var.data.load_digits", lambda image_size: (others, held_out))
    second = run_stage(experiment, "evaluate")
    assert drawn_batches == []
    assert second.metrics["fid_fake"] != first.metrics["fid_fake"]
    assert second.weights["fidelity.reference"] == "others"


def test_a_sweep_sees_another_reference(make_experiment, runs, pictures, monkeypatch):
    """All of its points are measured anew, and the table is joined from them."""
    one = {"sweep.last": [], "sweep.lists": {}, "sweep.chosen": None, "sweep.seeds": [0]}
    experiment = make_experiment(runs, {**one, "fidelity.reference": str(pictures(0))})
    monkeypatch.setattr("dmoe_var.stages.sweep._draw", lambda *_: None)
    first = run_stage(experiment, "sweep")
    assert run_stage(experiment, "sweep") == first
    pictures(1)
    second = run_stage(experiment, "sweep")
    assert second.metrics["dense_fid_mean"] != first.metrics["dense_fid_mean"]


def images_of_point(experiment):
    return experiment.fingerprint_of_images("evaluate", MEASURING)


def test_other_weights_of_the_network_are_measured_anew(make_experiment, tmp_path):
    path = tmp_path / "weights.pth"
    changes = {"fidelity.backbone": "inception", "fidelity.weights": str(path)}
    found = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        experiment = make_experiment(changes=changes)
        found.append((experiment.fingerprint("evaluate"), images_of_point(experiment)))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


# Images are kept by what they depend on


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"fidelity.input_size": 96}, ["samples.npz"]),
        ({"evaluate.format": "png"}, ["png"]),
        ({"evaluate.format": "both", "sampling.batch_size": 3}, ["png", "samples.npz"]),
    ],
)
def test_measuring_or_storing_otherwise_draws_nothing(
    make_experiment, point, drawn_batches, changes, places
):
    """The samples that the record names are there, and the numbers are the same."""
    runs, first = point
    experiment = make_experiment(runs, changes)
    record = run_stage(experiment, "evaluate")
    assert drawn_batches == []
    for name in ("fid_fake", "label_agreement", "flops_gmac_std", "sampling_ms_per_image"):
        assert record.metrics[name] == first.metrics[name]
    folder = experiment.folder("evaluate")
    assert record.about["samples"] == places[-1]
    assert record_if_done(experiment, "evaluate") == record
    names = {"config.yaml", "result.json", "drawn.npz", *places}
    assert {path.name for path in folder.iterdir()} == names
    assert len(list(folder.glob("png/*"))) == (20 if "png" in places else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate.seed": 1},
        {"selection.tau": 0.7},
        {"sampling.cfg": 2},
        {"evaluate.num_samples": 30},
        {"train_router.lr": 0.5},
        {"moe.scales": [3]},
    ],
)
def test_other_images_are_drawn(make_experiment, changes):
    assert images_of_point(make_experiment()) != images_of_point(make_experiment(changes=changes))


# Images that are given


def given(make_experiment, runs, path, **fields):
    shutil.rmtree(runs / "tiny", ignore_errors=True)  # no model is needed
    changes = {"evaluate.samples": str(path), **fields}
    return make_experiment(runs, changes)


@pytest.mark.parametrize("kind", ["labelled", "folder", "unlabelled"])
def test_given_images_are_measured(make_experiment, runs, tmp_path, monkeypatch, kind):
    """Real digits against real digits, without a model: the right class is seen in nearly all,
    where labels are there."""
    monkeypatch.setattr(evaluate, "Fidelity", Fidelity)
    monkeypatch.setattr(loaded, "var", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(loaded, "vqvae", lambda *_: pytest.fail("a model is loaded"))
    real, labels = real_digits()
    path = tmp_path / "theirs=1.npz"
    if kind == "folder":
        for i, (image, label) in enumerate(zip(real, labels, strict=True)):
            (path / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / str(label) / f"{i}.png")
    else:
        np.savez(path, arr_0=real, **({"labels": labels} if kind == "labelled" else {}))
    fields = {"fidelity.input_size": 32, "fidelity.precision_recall": True}
    experiment = given(make_experiment, runs, path, **fields)
    record = run_stage(experiment, "evaluate")
    network = Fidelity(experiment.config.fidelity)
    training = Bench(experiment).training_images.images
    expected = network.score(real, network.statistics(training), network.features(training))
    rel = 1e-3 if kind == "folder" else 1e-6  # another order
    agreement = record.metrics.pop("label_agreement", None)
    assert record.metrics == pytest.approx(expected, rel=rel)
    assert (agreement is None) == (kind == "unlabelled")
    if agreement is not None:
        grey, seen = (images.mean(-1).reshape(-1, 64) * 16 / 255 for images in (training, real))
        classifier = SVC(gamma=0.001).fit(grey, Bench(experiment).training_images.labels)
        assert agreement == pytest.approx(classifier.score(seen, labels), abs=0.02)
    assert record.num_samples == len(real)
    assert record.about["given"] == str(path)
    assert record.weights["evaluate.samples"] == record.about["given_sha256"]
    assert run_stage(experiment, "evaluate") == Record.read(
        experiment.folder("evaluate") / "result.json"
    )
    assert describe(experiment) == f"images of {path}"


@pytest.mark.parametrize("shift", [-1, 1])
def test_given_labels_that_are_no_classes(make_experiment, runs, tmp_path, monkeypatch, shift):
    monkeypatch.setattr(evaluate, "Fidelity", lambda *_: pytest.fail("something is measured"))
    real, labels = real_digits()
    np.savez(tmp_path / "theirs.npz", arr_0=real, labels=labels + shift)
    experiment = given(make_experiment, runs, tmp_path / "theirs.npz")
    with pytest.raises(DataError, match=r"evaluate.samples=.*theirs.npz: .*allowed: 0\.\.9$"):
        run_stage(experiment, "evaluate")


def real_digits():
    """Held-out digits, 8 x 8, and their classes."""
    _, held_out = load_digits(8)
    return held_out.images[:60], held_out.labels[:60]


def test_given_images_in_place_of_others_are_measured_anew(make_experiment, runs, tmp_path):
    path, (real, labels) = tmp_path / "theirs.npz", real_digits()
    experiment = given(make_experiment, runs, path)
    found = []
    for images in (real, 255 - real):
        np.savez(path, arr_0=images, labels=labels)
        found.append(run_stage(experiment, "evaluate").metrics["fid_fake"])
    assert found[0] != found[1]


def test_given_statistics_are_no_images(make_experiment, runs, tmp_path):
    path = tmp_path / "theirs.npz"
    np.savez(path, mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(DataError, match=rf"^evaluate.samples={path}: .*statistics and no images"):
        run_stage(given(make_experiment, runs, path), "evaluate")


def test_given_images_are_for_evaluate_alone(make_experiment, no_work):
    experiment = make_experiment(changes={"evaluate.samples": "gone.npz"})
    with pytest.raises(ConfigError, match=r"evaluate.samples=gone.npz: no such file or folder"):
        run_stage(experiment, "evaluate")
    for stage in ("sweep", "figures", "report"):
        with pytest.raises(ConfigError, match=r"evaluate.samples=gone.npz: .*null"):
            run_stage(experiment, stage)


# Labels


def test_labels_of_images_are_those_they_were_drawn_for(make_experiment, runs, monkeypatch):
    """A model that draws training images of the class it is asked for is right."""
    experiment = make_experiment(runs, {"evaluate.num_samples": 25, "evaluate.model": "dense"})
    real, batch = Bench(experiment).training_images, Drawing.batch
    of_class = [real.images[real.labels == label][0] for label in range(10)]

    def draw(self, number):
        drawn = batch(self, number)
        images = np.stack([of_class[label] for label in self.labels_of(number)])
        return replace(drawn, samples=replace(drawn.samples, images=images))

    monkeypatch.setattr(Drawing, "batch", draw)
    assert run_stage(experiment, "evaluate").metrics["label_agreement"] > 0.8


@pytest.mark.parametrize(("num_samples", "said"), [(20, 0), (25, 1)])
def test_unequal_classes_are_told_once(make_experiment, runs, capsys, num_samples, said):
    note.cache_clear()
    bench = Bench(make_experiment(runs))
    for seed in (0, 1):
        changes = {"evaluate.num_samples": num_samples, "evaluate.seed": seed}
        bench.drawing(make_experiment(runs, {**changes, "evaluate.model": "dense"}))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == said
    line = f"evaluate.num_samples={num_samples} is no multiple of 10 classes"
    assert [each for each in lines if not each.startswith(line)] == []


def test_other_processes_draw_and_do_not_measure(make_experiment, runs, monkeypatch):
    """They return what the main one found."""
    theirs = StageResult({"fid_fake": 1.0})
    monkeypatch.setattr(evaluate, "is_main", lambda: False)
    monkeypatch.setattr(evaluate, "from_main", lambda value: theirs)
    drawn = []
    monkeypatch.setattr(StoredDrawing, "draw", lambda self, progress: drawn.append(self))
    monkeypatch.setattr(evaluate, "Fidelity", lambda *_: pytest.fail("measures"))
    assert evaluate.run(make_experiment(runs)) is theirs
    assert len(drawn) == 1


def test_digits_alone_have_a_classifier(make_experiment, runs):
    experiment = make_experiment(runs)
    assert Bench(experiment).agreement is not None
    pictures = replace(experiment.config.data, kind="image_folder", root="pictures")
    other = Experiment(replace(experiment.config, data=pictures), experiment.baseline)
    assert Bench(other).agreement is None


@pytest.mark.parametrize("stage", ["evaluate", "sweep"])
def test_what_cannot_be_measured_is_refused(make_experiment, no_work, stage):
    for changes, parts in (
        ({"sampling.more_smooth": True}, ("sampling.more_smooth=true", "pictures", "false")),
        ({"fidelity.reference": "gone.npz"}, ("fidelity.reference=gone.npz", "no such")),
    ):
        experiment = make_experiment(changes=changes)
        with pytest.raises(ConfigError) as caught:
            run_stage(experiment, stage)
        message = str(caught.value)
        assert "\n" not in message
        assert [part for part in parts if part not in message] == [], message
        experiment.check("sample")


def test_the_reference_has_no_mirrored_pictures(make_experiment, monkeypatch):
    """Of four augmentations every second is mirrored: two are left."""
    folder = {"data.kind": "image_folder", "data.root": "x"}
    flipped = {**folder, "data.augmentations": 4, "data.flip": True}
    monkeypatch.setattr(evaluate, "image_sets", lambda work: (work.config.data, None))
    left = evaluate.Bench(make_experiment(edited=flipped)).reference_images
    assert left == make_experiment(edited={**folder, "data.augmentations": 2}).config.data
