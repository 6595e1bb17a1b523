"""Get the means that stand for experts that do not run (`moe.skipped=mean`).

They differ by selection, of which one run may have many. So no stage makes them: they are measured
when they are first asked for, and kept in the cache under a hash of all that they are made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from dmoe_var.calibration.skipped_means import measure_skipped_means
from dmoe_var.checkpoints.safetensors_io import MODEL_FILE
from dmoe_var.checkpoints.tensor_files import read_tensors, write_tensors
from dmoe_var.data.image_sets import evenly_strided
from dmoe_var.data.token_cache import TokenSet, weights_hash
from dmoe_var.distributed import from_main, is_main, rank, world_size
from dmoe_var.errors import CheckpointError
from dmoe_var.experiment.contents import hash_of
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.files import alone
from dmoe_var.models.dynamic_var import DynamicVAR, rules_of
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.selection import Selection, SelectionRule
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.parts.loaded import Models

FORMAT = "dmoe-var-skipped/1"
FOLDER = "skipped"
"""Within the cache that all experiments share."""


def get_means(models: Models, experiment: Experiment, selections: Iterable[Selection]) -> None:
    """Get the means of several selections for `models` to remember. All processes call it."""
    if experiment.config.moe.skipped == "mean":
        model = DynamicVAR(models.dense, models.experts, experiment.config.moe.scales)
        for selection in selections:
            let_means_stand(models, experiment, model, models.vqvae, selection)


def let_means_stand(
    models: Models, experiment: Experiment, model: DynamicVAR, vqvae: VQVAE, selection: Selection
) -> None:
    """Let means stand for what `selection` skips in `model`, if `moe.skipped` is mean.

    All processes call it at once, the first time. `models` remembers the means of the experiment's
    models under each selection: for those the main process may call it alone.
    """
    config = experiment.config
    if config.moe.skipped == "zero":
        return
    rules = rules_of(model, selection=selection)
    sampling = config.sampling
    how = (config.moe, sampling.cfg, sampling.share_mask, sampling.dtype)
    key = (
        "skipped",
        experiment.fingerprint_of_model(experiment.whole.expert_stage),
        repr(rules),
        how,
    )
    model.set_skipped(models.made(key, key, lambda: _means(experiment, model, vqvae, rules)))


def _means(
    experiment: Experiment, model: DynamicVAR, vqvae: VQVAE, rules: dict[int, SelectionRule]
) -> SkippedMeans:
    """Measure the means, or read them if they are in the cache."""
    moe, sampling = experiment.config.moe, experiment.config.sampling
    # Tokens are coded in float32, whatever dtype samples.
    tokens, _ = loaded.token_sets(experiment, loaded.vqvae(experiment))
    indices_N, selection = evenly_strided(len(tokens), moe.mean_images), list(rules.values())
    made_of = {
        "format": FORMAT,
        "models": [weights_hash(each) for each in (model.dense, model.moe, vqvae)],
        "images": _hash(tokens, indices_N),
        "rules": repr(rules),
        "sampling": [sampling.cfg, sampling.share_mask],
    }
    folder = experiment.cache / FOLDER / from_main(hash_of(made_of))
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder) if is_main() else nullcontext():
        means = from_main(_stored(folder, selection) if is_main() else None)
        if means is not None:
            return means
        mine = indices_N.split(sampling.batch_size)[rank() :: world_size()]
        shown = tqdm(mine, "means of skipped experts", disable=not experiment.progress)
        forced = (tokens.teacher_forced(each, vqvae) for each in shown)
        batches = ((labels_B, teacher_BLC) for _, labels_B, teacher_BLC in forced)
        means = measure_skipped_means(
            model, batches, selection, sampling.cfg, sampling.share_mask, moe.impl
        )
        if is_main():
            stored = {str(si): means.at(si) for si in means.scales}
            write_tensors(folder / MODEL_FILE, stored, {"rules": repr(rules)})
        return means


def _stored(folder: Path, selection: Selection) -> SkippedMeans | None:
    path = folder / MODEL_FILE
    if not path.exists():
        return None
    try:
        tensors, _ = read_tensors(path)
    except CheckpointError:  # cut short: it is measured anew
        return None
    return SkippedMeans({int(si): means_KEC for si, means_KEC in tensors.items()}, selection)


def _hash(tokens: TokenSet, indices_N: Tensor) -> str:
    """Hash tokens and labels of images."""
    digest = hashlib.sha256()
    for tensor in tokens.batch(indices_N):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
