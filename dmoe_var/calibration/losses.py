"""Measure what a choice of tau costs in quality: teacher-forced cross-entropy of sparse scales.

By default every scale weighs the same, as each covers the whole picture. By tokens the finest one
would decide, and coarse errors, which teacher forcing does not let grow, would look cheap.

Legend: B images, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe_var.data.image_sets import evenly_strided
from dmoe_var.data.token_cache import TokenSet
from dmoe_var.files import write_text
from dmoe_var.models.dynamic_var import DynamicVAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.selection import SelectionRule
from dmoe_var.ops import at_least_float32
from dmoe_var.training.tracking import read_lines


class TeacherForced:
    """Some images of a token set as a model under teacher forcing sees them."""

    def __init__(self, tokens: TokenSet, vqvae: VQVAE, num_images: int, batch_size: int):
        """Pick images that lie evenly over the set, which may be sorted by class."""
        self.tokens, self.vqvae = tokens, vqvae
        self.indices = evenly_strided(len(tokens), num_images).split(batch_size)

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """List labels (B,), teacher input (B, L - 1, Cvae) and the tokens to predict (B, L)."""
        of_batches = (self.tokens.teacher_forced(each, self.vqvae) for each in self.indices)
        return [(labels_B, teacher, tokens) for tokens, labels_B, teacher in of_batches]


@dataclass
class CrossEntropy:
    """Cross-entropy of the sparse scales in nats per token, and how often it was asked for. It is
    the mean of the scales' means or, with `by_tokens`, the mean over their tokens. With a file,
    measurements are kept there and not made twice."""

    model: DynamicVAR
    images: TeacherForced
    impl: str
    by_tokens: bool = False
    kept: Path | None = None
    fingerprint: str = ""
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.known: dict[str, float] = {}
        if self.kept is not None:
            lines = read_lines(self.kept, key=str, ce=(int, float), fingerprint=str)
            ours = [line for line in lines if line["fingerprint"] == self.fingerprint]
            self.known = {line["key"]: float(line["ce"]) for line in ours}

    def __call__(self, rules: Sequence[SelectionRule]) -> float:
        """Measure under one rule for each of the model's sparse scales."""
        self.count += 1
        key = repr(list(rules))
        if key not in self.known:
            self.known[key] = self._measure(rules)
            if self.kept is not None:
                lines = [
                    json.dumps({"key": key, "ce": ce, "fingerprint": self.fingerprint}) + "\n"
                    for key, ce in self.known.items()
                ]
                write_text(self.kept, "".join(lines))
        return self.known[key]

    def dense(self) -> float:
        """Measure the dense model at the same scales."""
        return self._mean(self.model.dense)

    def _measure(self, rules: Sequence[SelectionRule]) -> float:
        return self._mean(partial(self.model, selection=list(rules), impl=self.impl))

    def _mean(self, forward: Callable[[Tensor, Tensor], Tensor]) -> float:
        scales = self.model.moe_scales
        tokens_of = {step.si: step.tokens for step in self.model.plan()}
        totals, tokens = dict.fromkeys(scales, 0.0), dict.fromkeys(scales, 0)
        for labels_B, teacher_BLC, tokens_BL in self.images.batches():
            with torch.no_grad():
                logits_BLV = forward(labels_B, teacher_BLC)
            for si in scales:
                logits, target = logits_BLV[:, tokens_of[si]], tokens_BL[:, tokens_of[si]]
                totals[si] += F.cross_entropy(
                    at_least_float32(logits).flatten(0, 1), target.flatten(), reduction="sum"
                ).item()
                tokens[si] += target.numel()
        if self.by_tokens:
            return sum(totals.values()) / sum(tokens.values())
        return fmean(totals[si] / tokens[si] for si in scales)
