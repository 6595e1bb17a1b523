"""Training on a GPU that is not there: every objective comes to what it comes to on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dmoe_var.training.state import StateFile

LOOP = {"training/step.py:add", "training/loop.py:train", "training/objectives.py:add"}
"""Who waits for the GPU: the loop for the loss and for the gradient's norm, and each mean of a
validation. Under a mask also every layer, to refuse scores that are not finite."""
TOKENS = {"data/token_cache.py:teacher_forced", "models/var.py:check_labels", "values.py:_python"}
VQVAE = {f"training/vqvae_objective.py:{name}" for name in ("loss", "_restart", "validate")}
VQVAE |= {"data/in_memory.py:tensors"}
CLASSIFIER = {
    f"training/classifier_objective.py:{name}" for name in ("_batch", "varied", "_accuracy")
}
CLASSIFIER |= {"data/in_memory.py:tensors"}
WAITS = {
    "vqvae": LOOP | VQVAE,
    "classifier": LOOP | CLASSIFIER,
    "var": LOOP | TOKENS,
    "sparsify": LOOP | TOKENS | {"training/objectives.py:loss"},
    "router": LOOP | TOKENS,
    "tune": LOOP
    | TOKENS
    | {"training/tuning_objective.py:loss", "moe/selection/finite.py:require_finite"},
}


FLOAT32_ALONE = {"vqvae", "classifier"}
DISTILLED = {"training/distillation.py:prediction_loss"}


@pytest.mark.parametrize(
    ("kind", "dtype", "distill"),
    [
        *((kind, torch.float32, {}) for kind in WAITS),
        *((kind, torch.bfloat16, {}) for kind in WAITS if kind not in FLOAT32_ALONE),
        *((kind, torch.float32, {"distill": 0.5}) for kind in ("sparsify", "tune")),
    ],
)
def test_training(build, run_in, cuda_dry_run, tmp_path, monkeypatch, kind, dtype, distill):
    """A step and a validation. A state is written from memory, which fake tensors have none of."""
    monkeypatch.setattr(StateFile, "save", lambda *_: None)
    fields = {"conversion": {"scales": "last3"}, "steps": 1, "batch_size": 4, **distill}
    on_cpu = run_in(tmp_path / "cpu", *build(kind, dtype, **fields))
    with cuda_dry_run() as run:
        objective, config = build(kind, dtype, device="cuda", **fields)
        run.waits.clear()
        on_gpu = run_in(tmp_path / "gpu", objective, config)
        assert run.waits.keys() == WAITS[kind] | (DISTILLED if distill else set())
        assert run.waits["training/step.py:add"] == run.waits["training/loop.py:train"] == 1
    coarse = 10 if dtype == torch.bfloat16 else 1
    if coarse > 1:  # near-equal norms change ranks where the CPU rounds elsewhere
        on_gpu, on_cpu = (
            {k: v for k, v in found.items() if "rank" not in k} for found in (on_gpu, on_cpu)
        )
    assert_close(on_gpu, on_cpu, rtol=1e-3 * coarse, atol=1e-4 * coarse)
