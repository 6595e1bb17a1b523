"""Learn the dense model's predictions beside the tokens (beyond the paper).

Conversion has to keep what the dense model predicts. A token tells one code of it, the dense
model's own prediction tells how likely every code is, which is far less noisy. Legend: B batch,
l tokens that are learnt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Join = Callable[[Tensor], Tensor]
"""Makes of logits (B, l, V) those that are compared."""


def alone(logits_BlV: Tensor) -> Tensor:
    """Compare each row's logits as they are."""
    return logits_BlV


def prediction_loss(
    logits_BlV: Tensor,
    tokens_Bl: Tensor,
    dense_BlV: Tensor | None,
    distill: float,
    join: Join = alone,
) -> tuple[Tensor, dict[str, float]]:
    """Return (1 - distill) * CE(tokens) + distill * KL(dense || model), means over tokens, and both
    terms to log. Without logits of the dense model the loss is CE(tokens), and nothing is logged
    beside it. join: makes what KL compares; CE takes the logits as they are."""
    logits_NV = logits_BlV.flatten(0, 1)
    cross_entropy = F.cross_entropy(logits_NV, tokens_Bl.flatten())
    if dense_BlV is None:
        return cross_entropy, {}
    kl = divergence(join(logits_BlV), join(dense_BlV))
    loss = kl if distill == 1 else (1 - distill) * cross_entropy + distill * kl
    return loss, {"ce": cross_entropy.item(), "kl": kl.item()}


def divergence(logits_BlV: Tensor, dense_BlV: Tensor) -> Tensor:
    """Compute KL(dense || model), the mean over tokens, in nats."""
    log_p_NV = logits_BlV.flatten(0, 1).log_softmax(-1)
    log_dense_NV = dense_BlV.flatten(0, 1).log_softmax(-1)
    return F.kl_div(log_p_NV, log_dense_NV, log_target=True, reduction="batchmean")
