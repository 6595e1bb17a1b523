"""Figures 2b and 12: the images after each of the last scales, and the experts that ran."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dmoe_var.figures.style import Paths, save, styled, subplots


class ExpertMaps(NamedTuple):
    """Holds the images and maps of N images at each of S sparse scales, for one tau.

    images: uint8 (N, S, R, R, 3), decoded after the scale. maps: float (N, S, P, P), the density on
    each token of the conditional branch over all layers, enlarged to the finest scale's side P.
    """

    images: np.ndarray
    maps: np.ndarray


@styled
def draw(by_tau: dict[str, ExpertMaps], scales: list[int], paths: Paths) -> None:
    """Plot columns for each tau and two rows per image, picture and map; darker: fewer experts."""
    num_images = len(next(iter(by_tau.values())).images)
    columns = len(by_tau) * len(scales)
    figure, axes = subplots(
        2 * num_images, columns, figsize=(1.1 * columns, 2.2 * num_images), squeeze=False
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
    for t, (tau, data) in enumerate(by_tau.items()):
        for s, si in enumerate(scales):
            column = t * len(scales) + s
            axes[0, column].set_title(f"{tau}\nscale {si + 1}", fontsize=7)
            for i in range(num_images):
                axes[2 * i, column].imshow(data.images[i, s], interpolation="nearest")
                shown = axes[2 * i + 1, column].imshow(
                    data.maps[i, s], cmap="gray", vmin=0, vmax=1, interpolation="nearest"
                )
    bar = figure.colorbar(shown, ax=axes, shrink=0.5, pad=0.01)
    bar.set_label("share of experts run on a token", fontsize=8)
    save(figure, paths)
