"""Group FFN neurons by balanced k-means: every expert gets exactly `expert_size` of them.

Legend: H neurons of the hidden layer, C width, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def balanced_labels(fc1_HC: Tensor, expert_size: int, seed: int) -> Tensor:
    """Choose each neuron's expert, LongTensor (H,), by balanced k-means of the L2-normalised rows.

    k-means-constrained makes all sizes exact (it assigns by a minimum-cost flow). Raises ValueError
    if expert_size does not divide H.
    """
    from k_means_constrained import KMeansConstrained

    num_neurons = fc1_HC.shape[0]
    num_experts, rest = divmod(num_neurons, expert_size)
    if rest:
        raise ValueError(f"expert_size={expert_size} does not divide the FFN's {num_neurons}")
    if num_experts == 1:
        return torch.zeros(num_neurons, dtype=torch.long)
    rows = F.normalize(fc1_HC.detach().cpu().double(), dim=1).numpy()
    kmeans = KMeansConstrained(
        num_experts, size_min=expert_size, size_max=expert_size, random_state=seed, n_init=1
    )
    return torch.from_numpy(np.asarray(kmeans.fit_predict(rows), dtype=np.int64))
