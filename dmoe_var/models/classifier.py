"""A small residual network (arXiv 1512.03385) that classifies pictures, to judge generated ones.

Legend: B batch, C channels, H W height and width, R image side, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dmoe_var.config_fields import STRICT, Positive


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the classifier."""

    __pydantic_config__ = STRICT

    num_classes: Positive
    width: Annotated[int, Field(gt=0, le=1024)] = 32
    blocks: Annotated[int, Field(gt=0, le=32)] = 1


class Block(nn.Module):
    """Adds two normalised convolutions to their input, which a third fits in if the shape changes.
    Between groups the side is halved."""

    def __init__(self, in_C: int, C: int):
        super().__init__()
        stride = 1 if in_C == C else 2
        self.conv1 = _conv(in_C, C, 3, stride)
        self.conv2 = _conv(C, C, 3, 1)
        self.shortcut = nn.Identity() if in_C == C else _conv(in_C, C, 1, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        residual_BCHW = self.conv2(F.relu(self.conv1(x_BCHW)))
        return F.relu(residual_BCHW + self.shortcut(x_BCHW))


def _conv(in_C: int, C: int, side: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_C, C, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(C))


class ResNetClassifier(nn.Module):
    """Three groups of residual blocks, each of twice the channels and half the side of the one
    before, then the mean over all places and a linear layer. It takes images of any size."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        C = config.width
        self.stem = _conv(3, C, 3, 1)
        widths = [group * C for group in (1, 2, 4) for _ in range(config.blocks)]
        self.blocks = nn.Sequential(*(Block(*pair) for pair in pairwise([C, *widths])))
        self.head = nn.Linear(widths[-1], config.num_classes)

    def forward(self, images_B3RR: Tensor) -> Tensor:
        """Compute logits (B, K) of images in [-1, 1]."""
        images_B3RR = images_B3RR.contiguous(memory_format=torch.channels_last)
        x_BCHW = self.blocks(F.relu(self.stem(images_B3RR)))
        logits_BK: Tensor = self.head(x_BCHW.mean((2, 3)))
        return logits_BK
