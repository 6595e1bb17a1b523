"""A network as the classifier of label agreement, from its training to the record of a point."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.data.images import scaled
from dmoe_var.errors import CheckpointError, ConfigError, InputError
from dmoe_var.experiment.graph import record_if_done, run_stage, run_through
from dmoe_var.experiment.stage import find
from dmoe_var.models.classifier import ClassifierConfig, ResNetClassifier
from dmoe_var.stages.evaluate import Bench
from dmoe_var.stages.parts import loaded

RESNET = {"fidelity.classifier": "resnet"}
SHORT = {
    "train_classifier.epochs": 4, "train_classifier.batch_size": 20, "train_classifier.width": 8,
    "train_classifier.flip": False, "train_classifier.shift": 0, "train_classifier.lr": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def judged(make_experiment, kept_runs):
    """A run folder with a point that is judged by the SVC, then by a network, and both records; not
    to be written to. Nothing is drawn for the second."""
    plain = run_stage(make_experiment(kept_runs, {}, SHORT), "evaluate")
    experiment = make_experiment(kept_runs, RESNET, SHORT)
    with pytest.raises(InputError, match=r"train_classifier is not done in .*scripts/train_cl"):
        run_stage(experiment, "evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmoe_var.sampling.draw.Drawing.batch", lambda *_: pytest.fail("it draws"))
        return kept_runs, plain, run_through(experiment, "evaluate", lambda *_: None)


def test_the_record_of_a_point_says_how_its_labels_were_seen(make_experiment, judged, images_of):
    runs, plain, record = judged
    experiment = make_experiment(runs, RESNET, SHORT)
    network = loaded.classifier(experiment)

    def accuracy(images, labels):
        logits = network(scaled(torch.from_numpy(images)))
        return float((logits.argmax(1).numpy() == labels).mean())

    held_out = Bench(experiment).image_sets[1]
    samples = images_of(experiment.folder("evaluate") / "samples.npz")
    labels = [*range(10)] * 2
    assert record.metrics["label_agreement"] == pytest.approx(accuracy(samples, labels))
    told = {
        "classifier": "resnet",
        "classifier_held_out_accuracy": accuracy(held_out.images, held_out.labels),
    }
    drawn = {k: v for k, v in plain.about.items() if k != "experts_ran_by"}
    assert {**drawn, **told} == record.about
    trained = record_if_done(experiment, "train_classifier")
    assert trained.metrics["val_accuracy"] == pytest.approx(told["classifier_held_out_accuracy"])
    assert "label_agreement" in plain.metrics
    assert plain.variant == "default"
    assert not [key for key in make_experiment().relevant("evaluate") if "classifier" in key]


def test_who_needs_the_network(make_experiment):
    for stage in ("evaluate", "sweep"):
        plain, asked = make_experiment(), make_experiment(changes=RESNET)
        assert asked.needs(stage) == (*plain.needs(stage), "train_classifier")
        given = make_experiment(changes={**RESNET, "base.classifier": "there"})
        assert given.is_given("train_classifier")
    wide = make_experiment(changes={**RESNET, "train_classifier.width": 16})
    assert wide.fingerprint("evaluate") != asked.fingerprint("evaluate")


def test_a_network_of_another_experiment(make_experiment, judged, tmp_path):
    """It is validated by its own stage, and evaluation does without that."""
    runs, _, record = judged
    made = make_experiment(runs, RESNET, SHORT).folder("train_classifier")
    source = shutil.copytree(made, tmp_path / "source")
    given = {**RESNET, "base.classifier": str(source)}
    real, _ = Bench(make_experiment(runs)).image_sets
    np.savez(tmp_path / "real.npz", arr_0=real.images, labels=real.labels)
    experiment = make_experiment(
        tmp_path / "others", {**given, "evaluate.samples": str(tmp_path / "real.npz")}
    )
    measured = run_stage(experiment, "evaluate")
    for key in ("classifier", "classifier_held_out_accuracy"):
        assert measured.about[key] == record.about[key]
    assert "base.classifier" in measured.weights
    validated = run_stage(experiment, "train_classifier")
    assert validated.about == {"source": str(source)}
    save_checkpoint(source / "checkpoint", ResNetClassifier(ClassifierConfig(11, 8)))
    with pytest.raises(CheckpointError, match=r"11 classes; expected var.num_classes=10"):
        run_stage(experiment, "train_classifier")


@pytest.mark.parametrize(
    ("config", "drop", "message"),
    [
        (ClassifierConfig(10, 16), None, "width is 16, the configuration says 8"),
        (ClassifierConfig(10, 8), "blocks.0.conv1.1.running_var", "missing 1 keys: .*running_var"),
    ],
)
def test_a_network_is_loaded_strictly(make_experiment, tmp_path, config, drop, message):
    experiment = make_experiment(tmp_path, RESNET, SHORT)
    network = ResNetClassifier(config)
    if drop is not None:
        module, _, buffer = drop.rpartition(".")
        delattr(network.get_submodule(module), buffer)
    folder = loaded.checkpoint(experiment, "train_classifier")
    folder.parent.mkdir(parents=True)
    save_checkpoint(folder, network)
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded.classifier(experiment)
    assert "\n" not in str(caught.value)


def test_what_is_refused(make_experiment, monkeypatch):
    for changes, message in (
        ({"fidelity.classifier": "svm"}, "fidelity.classifier='svm': .*'resnet'"),
        ({"train_classifier.micro_batch_size": 4}, "train_classifier.micro_batch_size=4 must be"),
        ({"train_classifier.shift": 9}, "train_classifier.shift=9: .*equal to 7"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_experiment(changes=changes)
    monkeypatch.setattr("dmoe_var.experiment.stage.launched_processes", lambda: 2)
    with pytest.raises(ConfigError, match="train_classifier runs in one process, torchrun"):
        find("train_classifier").check(make_experiment().config)
