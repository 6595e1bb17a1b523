"""Pictures to look at: chosen classes, dense beside dynamic from the same seeds."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dmoe_var.figures import sample_grid
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.sampling.draw import SAMPLES_FILE
from dmoe_var.stages.evaluate import Bench
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.work import Work

MOST_CLASSES = 10


def run(work: Work) -> StageResult:
    """Writes samples.npz of each model, grid.png, and single PNGs where asked."""
    config, bench = work.config, Bench(work)
    classes = config.sample.classes or range(min(MOST_CLASSES, config.var.num_classes))
    labels = np.tile(np.array(classes, dtype=np.int64), config.sample.per_class)
    dynamic = DynamicVAR(bench.dense, bench.experts, config.moe.scales)
    folder = work.folder("sample")
    panels = {}
    for name, model in (("dense", bench.dense), ("dynamic", dynamic)):
        samples, _ = bench.draw(work, model, labels, name)
        samples.save(folder / name / SAMPLES_FILE)
        if config.sample.single_pngs:
            for i, image in enumerate(samples.images):
                Image.fromarray(image).save(folder / name / f"{i:05d}_class{labels[i]}.png")
        panels[name] = samples.images
    sample_grid.draw(panels, len(classes), folder / "grid.png")
    return StageResult({}, num_samples=len(labels), about={"grid": "grid.png"})
