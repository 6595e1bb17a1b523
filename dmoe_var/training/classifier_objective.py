"""Train the classifier of pictures that judges whether generated ones show their class.

Legend: B batch, R image side, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dmoe_var.config_fields import Share
from dmoe_var.data.images import Images
from dmoe_var.models.blocks import Rows
from dmoe_var.models.classifier import ResNetClassifier
from dmoe_var.training.objectives import VALIDATION_BATCH, Mean
from dmoe_var.training.step import OptimConfig, Positive


@dataclass(frozen=True)
class ClassifierTrainingConfig(OptimConfig):
    """Shape and training of the classifier that sees labels (fidelity.classifier=resnet)."""

    epochs: Positive | None = 10.0
    """Passes over the training set; null if steps is given."""
    batch_size: Annotated[int, Field(gt=0)] = 128
    """Examples per step."""
    lr: Annotated[float, Field(gt=0, le=10)] = 5e-3
    """Learning rate after the warmup."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes from lr to lr_end: constant, linear or cosine."""
    warmup: Share = 0.15
    """Share of the steps over which the learning rate rises."""
    width: Annotated[int, Field(gt=0, le=1024)] = 32
    """Channels of the first of three groups of residual blocks; the others have 2 and 4 times as
    many."""
    blocks: Annotated[int, Field(gt=0, le=32)] = 1
    """Residual blocks per group."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target that all classes have in common."""
    flip: bool = True
    """Whether half of the pictures are mirrored, by chance; not for digits and letters."""
    shift: Annotated[int, Field(ge=0, le=7)] = 4
    """Most pixels by which a picture is moved in each direction, by chance; its edges are
    mirrored into the gap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} must be null: layers are normalised "
                "over whole batches"
            )
        if self.ema is not None:
            raise ValueError(
                f"ema={self.ema} must be null: the statistics of its norms are not averaged"
            )


class ClassifierObjective:
    """Cross-entropy of the class, with smoothed labels, of pictures that are mirrored and moved."""

    repeatable = False

    def __init__(
        self,
        network: ResNetClassifier,
        training: Images,
        held_out: Images,
        config: ClassifierTrainingConfig,
    ):
        self.module: nn.Module = network
        self.training = training
        self.held_out = held_out
        self.config = config
        self.num_examples = len(training)
        self.device = network.head.weight.device

    def loss(
        self, indices_B: Tensor, step: int, num_steps: int, rows: Rows
    ) -> tuple[Tensor, dict[str, float]]:
        images_B3RR, labels_B = self._batch(self.training, indices_B)
        images_B3RR = varied(images_B3RR, self.config.flip, self.config.shift)
        logits_BK = self.module(images_B3RR).float()
        loss = F.cross_entropy(logits_BK, labels_B, label_smoothing=self.config.label_smoothing)
        return loss, {"accuracy": _accuracy(logits_BK, labels_B)}

    def after_step(self, step: int, num_steps: int) -> None:
        """Do nothing between steps."""

    def validate(self) -> dict[str, float]:
        """Measure cross-entropy and accuracy on the held-out images, as they are."""
        mean = Mean()
        for indices_B in torch.arange(len(self.held_out)).split(VALIDATION_BATCH):
            images_B3RR, labels_B = self._batch(self.held_out, indices_B)
            logits_BK = self.module(images_B3RR)
            mean.add("val_ce", F.cross_entropy(logits_BK, labels_B), len(indices_B))
            mean.add("val_accuracy", _accuracy(logits_BK, labels_B), len(indices_B))
        return mean.result()

    def _batch(self, images: Images, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        labels_B = torch.from_numpy(images.labels[indices_B.numpy()])
        return images.tensors(indices_B, self.device), labels_B.to(self.device)


def varied(images_B3RR: Tensor, flip: bool, shift: int) -> Tensor:
    """Mirror half of the images, and move each by up to `shift` pixels, by torch's random numbers
    on the CPU: those of a step are the same on every device."""
    B, _, R, _ = images_B3RR.shape
    mirrored_B1 = (torch.rand(B, 1) < 0.5) & flip
    top_B1, left_B1 = torch.randint(2 * shift + 1, (2, B, 1))
    places_R = torch.arange(R)
    rows_BR = top_B1 + places_R
    columns_BR = left_B1 + torch.where(mirrored_B1, R - 1 - places_R, places_R)
    padded = F.pad(images_B3RR, [shift] * 4, mode="reflect")
    at = (torch.arange(B)[:, None, None], rows_BR[:, :, None], columns_BR[:, None, :])
    each_B, rows, columns = (index.to(padded.device) for index in at)
    moved_BRR3 = padded[each_B, :, rows, columns]
    return moved_BRR3.permute(0, 3, 1, 2)


def _accuracy(logits_BK: Tensor, labels_B: Tensor) -> float:
    return (logits_BK.argmax(1) == labels_B).float().mean().item()
