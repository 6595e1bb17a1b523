"""The classifier of pictures: its network, its loss, what is drawn, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmoe_var.data.in_memory import ImageSet
from dmoe_var.models.blocks import whole
from dmoe_var.models.classifier import ClassifierConfig, ResNetClassifier
from dmoe_var.training.classifier_objective import (
    ClassifierObjective,
    ClassifierTrainingConfig,
    varied,
)

ALL = torch.arange(20)


def convolved(x, weights, name, stride):
    """A convolution and the normalisation by running statistics."""
    kernel = weights[f"{name}.0.weight"]
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    mean, var, gain, bias = (
        weights[f"{name}.1.{key}"].view(-1, 1, 1)
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * gain + bias


def test_network():
    """Two blocks a group against functions in float64; the side halves twice."""
    torch.manual_seed(0)
    network = ResNetClassifier(ClassifierConfig(num_classes=5, width=4, blocks=2)).double()
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1) if tensor.ndim == 1 else tensor.normal_(0, 0.3)
    weights = network.state_dict()
    images = torch.rand(3, 3, 12, 12, dtype=torch.float64) * 2 - 1
    x, sides = convolved(images, weights, "stem", 1).relu(), []
    for block in range(6):
        stride = 2 if block in (2, 4) else 1
        name = f"blocks.{block}"
        y = convolved(convolved(x, weights, f"{name}.conv1", stride).relu(), weights,
                      f"{name}.conv2", 1)  # fmt: skip
        x = (y + (convolved(x, weights, f"{name}.shortcut", 2) if stride == 2 else x)).relu()
        sides.append(tuple(x.shape[1:3]))
    expected = x.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(network.eval()(images), expected)
    assert sides == [(4, 12)] * 2 + [(8, 6)] * 2 + [(16, 3)] * 2


def test_loss_has_smoothed_labels(build, digits):
    """0.8 on the class and 0.2 over all; nothing is moved, as a step's images are."""
    objective, _ = build("classifier", label_smoothing=0.2, flip=False, shift=0)
    loss, logged = objective.loss(ALL, 0, 10, whole(20))
    logits = objective.module(digits[0].tensors(ALL)).double()
    labels = torch.from_numpy(digits[0].labels)
    target = 0.8 * F.one_hot(labels, 10) + 0.02
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert logged["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


def test_images_are_mirrored_and_moved():
    """Each image is one of the 2 x 5 x 5 that plain padding, mirroring and cutting give, and all of
    them come up; the same random numbers give the same."""
    image = torch.randn(3, 6, 6)
    torch.manual_seed(0)
    found = varied(image.expand(2000, 3, 6, 6), True, 2)
    padded = np.pad(image.numpy(), [(0, 0), (2, 2), (2, 2)], "reflect")
    cuts = [padded[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    every = torch.from_numpy(np.stack([*cuts, *(cut[:, :, ::-1] for cut in cuts)]))
    same_NV = torch.stack([(found == each).flatten(1).all(1) for each in every], 1)
    assert same_NV.any(1).all()
    counts_V = same_NV.sum(0)
    assert counts_V.min() > 10
    assert 900 < counts_V[:25].sum() < 1100
    torch.manual_seed(0)
    assert torch.equal(varied(image.expand(2000, 3, 6, 6), True, 2), found)
    assert torch.equal(varied(image[None], False, 0)[0], image)
    unmirrored = varied(image.expand(200, 3, 6, 6), False, 2)
    assert all((unmirrored == each).flatten(1).all(1).sum() == 0 for each in every[25:])


@torch.no_grad()
def test_validation(build, digits, monkeypatch):
    monkeypatch.setattr("dmoe_var.training.classifier_objective.VALIDATION_BATCH", 4)
    objective, _ = build("classifier")
    network = objective.module.eval()
    logits, labels = network(digits[1].tensors(ALL[:10])), torch.from_numpy(digits[1].labels)
    assert objective.validate() == pytest.approx({
        "val_ce": float(F.cross_entropy(logits, labels)),
        "val_accuracy": float((logits.argmax(1) == labels).float().mean()),
    })  # fmt: skip


def stripes(number, seed):
    """Images of three classes, which differ in the place of red and in the direction of stripes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, number)
    images = rng.integers(0, 160, (number, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        bright = (slice(None), slice(None, None, 4)) if label == 0 else (slice(None, None, 4),)
        image[(*bright, ..., 1 if label < 2 else 0)] += 90
    return ImageSet.named("stripes", images, labels, 3)


def test_it_learns(run_in, tmp_path):
    torch.manual_seed(0)
    config = ClassifierTrainingConfig(steps=40, epochs=None, batch_size=32, lr=1e-2)
    network = ResNetClassifier(ClassifierConfig(3, 8))
    objective = ClassifierObjective(network, stripes(300, 0), stripes(200, 1), config)
    assert run_in(tmp_path, objective, config)["val_accuracy"] > 0.95


def test_parts_of_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"micro_batch_size=4 must be null: .* whole batches"):
        ClassifierTrainingConfig(micro_batch_size=4)
    with pytest.raises(ValueError, match=r"ema=0.9 must be null: .* not averaged"):
        ClassifierTrainingConfig(ema=0.9)
