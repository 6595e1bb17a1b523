"""Plot how a base model learns, from numbers and pictures of its snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmoe_var.figures import fid_over_flops
from dmoe_var.figures.sample_grid import tile
from dmoe_var.figures.style import Paths, colour, new_figure, save, styled

WIDTH, PANELS, PICTURE = 10.0, 3.0, 0.55
"""Inches: of the figure, of the height of its panels, and of a picture's side at most."""
LEGEND = 0.3
"""Room for the legend above the losses, over their height."""


@styled
def draw(
    data: Mapping[str, Any], strip: Mapping[str, np.ndarray], title: str, paths: Paths
) -> None:
    """Plot held-out cross-entropy and accuracy by scale, FID over steps, and below them the strip:
    a row per snapshot by its name, uint8 (N, R, R, 3)."""
    columns = len(next(iter(strip.values())))
    height = len(strip) * min(PICTURE, WIDTH / columns)
    figure = new_figure(WIDTH, PANELS + height + 0.6)
    ratios = (PANELS, height + 0.6)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    ce, accuracy, fid = upper.subplots(1, 3, gridspec_kw={"wspace": 0.35})
    # By scale
    validated, patch_nums = data["validated"], data["patch_nums"]
    for axis, key in ((ce, "ce"), (accuracy, "accuracy")):
        for si, values in enumerate(validated[key]):
            shade = colour("last", si / max(1, len(patch_nums) - 1))
            name = f"{patch_nums[si]} x {patch_nums[si]}"
            axis.plot(validated["steps"], values, color=shade, linewidth=1.2, label=name)
    fid_over_flops.finish(ce, "optimiser step", "held-out cross-entropy, nats a token", "")
    low, high = ce.get_ylim()
    ce.set_ylim(low, high + LEGEND * (high - low))
    ce.legend(loc="upper center", ncols=3, fontsize=6.5)
    fid_over_flops.finish(accuracy, "optimiser step", "held-out accuracy", "", legend=False)
    # FID
    (curve,) = data["curves"]
    rows = curve["rows"]
    means, stds = ([row[key] for row in rows] for key in ("fid_mean", "fid_std"))
    steps = [row["value"] for row in rows]
    fid.errorbar(steps, means, stds, color=colour("dense"), marker="o", markersize=4, capsize=2)
    fid_over_flops.finish(fid, "optimiser step", fid_over_flops.display_name(data["fid"]), "")
    # Pictures
    axis = lower.subplots()
    images = np.concatenate([*strip.values()])
    axis.imshow(tile(images, columns), interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    side = images.shape[1] + 1
    axis.set_xticks([])
    axis.set_yticks([side * (i + 0.5) for i in range(len(strip))], [*strip], fontsize=7)
    axis.tick_params(length=0)
    upper.suptitle(title, fontsize=9)
    figure.text(0.5, -0.01, data["note"], ha="center", fontsize=6.5, color="#555555")
    save(figure, paths)
