"""The one layout of expert weights.

Legend: C width, E experts, D neurons per expert.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ExpertWeights(NamedTuple):
    """Holds the weights of all experts of a layer.

    w1_EDC, b1_ED: rows of fc1 and its bias; w2_EDC: columns of fc2; b2_C: the shared output bias.
    """

    w1_EDC: Tensor
    b1_ED: Tensor
    w2_EDC: Tensor
    b2_C: Tensor
