"""Draws many labelled images batch by batch, and stores them as the ADM evaluator reads them.

Legend: N images, R image side.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dmoe_var.errors import DataError
from dmoe_var.metrics.images import to_uint8
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.moe.layer import ExpertCounts
from dmoe_var.moe.selection import SelectionRule
from dmoe_var.sampling.sampler import SamplingConfig, generate

SAMPLES_FILE = "samples.npz"


@dataclass(frozen=True)
class Samples:
    """images: uint8 (N, R, R, 3). Image i is drawn for labels[i] from stream i of seeds[i]:
    `generate(..., labels=[labels[i]], seed=seeds[i], start_index=i)` draws it again."""

    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray

    def save(self, path: Path) -> None:
        """Write arr_0, labels and seeds, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, arr_0=self.images, labels=self.labels, seeds=self.seeds)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Stored samples; DataError where the file is missing or broken."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["arr_0"], file["labels"], file["seeds"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: missing or no samples file ({error})") from error


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """Class of each image, int64 (N,): the classes in turn, so that all are as frequent."""
    return np.arange(num_samples, dtype=np.int64) % num_classes


def draw_samples(
    model: VAR | DynamicVAR,
    vqvae: VQVAE,
    labels: np.ndarray,
    seed: int,
    sampling: SamplingConfig,
    selection: SelectionRule | Sequence[SelectionRule] | None = None,
    impl: str = "grouped",
    progress: str | None = None,
) -> tuple[Samples, list[ExpertCounts]]:
    """Images of the given labels, and the experts run, one ExpertCounts a batch.

    `progress` names the bar; None shows none.
    """
    images, counts = [], []
    starts = range(0, len(labels), sampling.batch_size)
    for start in tqdm(starts, progress, unit="batch", leave=False, disable=progress is None):
        batch = torch.from_numpy(labels[start : start + sampling.batch_size])
        batch_counts = ExpertCounts()
        drawn = generate(
            model,
            vqvae,
            batch,
            cfg=sampling.cfg,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=seed,
            selection=selection,
            start_index=start,
            more_smooth=sampling.more_smooth,
            impl=impl,
            counts=batch_counts,
        )
        images.append(to_uint8(drawn))
        counts.append(batch_counts)
    seeds = np.full(len(labels), seed, dtype=np.int64)
    return Samples(np.concatenate(images), labels, seeds), counts
