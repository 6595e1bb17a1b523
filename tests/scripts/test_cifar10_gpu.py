"""The base training and the conversion of cifar10_gpu: its own size, two steps each, on a CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dmoe_var import load_var

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAININGS = ("train_vqvae", "train_var", "sparsify", "train_router")

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path):
    """A folder of noise, four training pictures and two others per class."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 4), ("test", 2)):
        for name in CLASSES:
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_pictures_become_experts_and_samples(launch, root, tmp_path):
    given = [
        "experiment=cifar10_gpu", f"data.root={root}", "run_dir=runs", "device=cpu",
        "data.workers=0", "data.encode_batch=2", "data.held_out=2", "progress=false",
        *(f"{stage}.{key}" for stage in TRAININGS
          for key in ("steps=2", "epochs=null", "batch_size=2")),
    ]  # fmt: skip
    few = ["evaluate.num_samples=2", "sampling.batch_size=1"]
    plain = ["fidelity.classifier=null", "fidelity.precision_recall=false"]
    for script, *extra in (("pipeline", "until=train_router"), ("evaluate", *few, *plain)):
        finished = launch(script, *given, *extra, cwd=tmp_path)
        assert finished.status == 0, finished.stderr[-2000:]
    runs = tmp_path / "runs" / "cifar10_gpu"
    records = {path.parts[-3]: path for path in runs.rglob("result.json")}
    assert set(records) == {*TRAININGS, "split", "evaluate"}
    config = load_var(records["train_router"].parent).config
    assert (config.depth, config.width, config.num_tokens) == (8, 512, 680)
    metrics = json.loads(records["evaluate"].read_text())["metrics"]
    assert np.isfinite(metrics["flops_gmac"])
    (samples,) = runs.glob("evaluate/*/samples.npz")
    assert np.load(samples)["arr_0"].shape == (2, 32, 32, 3)
