"""What stands for an expert that does not run: the mean of its output on the tokens that skip it.

Beyond the paper, where nothing does. Legend: N tokens, K layers, E experts, C width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dmoe_var.moe.selection import Selection
from dmoe_var.ops import linear


class SkippedMeans(nn.Module):
    """Holds the means of each scale with experts, (K, E, C), without the shared output bias.

    selection: what they were measured under. They are means of what that skips; any other rule may
    run with them, and then adds what they are.
    """

    def __init__(self, means: Mapping[int, Tensor], selection: Selection = None):
        super().__init__()
        self.scales = tuple(sorted(means))
        self.selection = selection
        for si in self.scales:
            self.register_buffer(_name(si), means[si])

    def at(self, si: int) -> Tensor:
        """Return the means of a scale, (K, E, C)."""
        return self.get_buffer(_name(si))


def _name(si: int) -> str:
    return f"scale{si}_KEC"


def add_means(out_NC: Tensor, mask_NE: Tensor, means_EC: Tensor) -> Tensor:
    """Add to each token the means of the experts that its mask leaves out, (N, C)."""
    return out_NC + linear((~mask_NE).to(out_NC.dtype), means_EC.T)
