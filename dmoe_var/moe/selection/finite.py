"""Check that scores are finite before they decide what runs."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe_var.errors import InputError
from dmoe_var.sampling_time import this_sampling

NOT_FINITE = "an expert's score is not finite: the router or its input has overflowed"


def check_finite(scores: Tensor) -> Tensor:
    """Return the scores; raise InputError if there is NaN or infinity among them.

    While a GPU samples images the error comes at the end: a check at every layer would wait for it.
    """
    # torch.compile knows no values, so it sees the whole check as one operator.
    return _finite(scores.detach()) if torch.compiler.is_compiling() else _checked(scores)


def require_finite(finite: Tensor) -> None:
    """Raise InputError as `check_finite` does, unless `finite`, a truth value on any device."""
    sampling = this_sampling()
    if sampling is not None and finite.device.type != "cpu":
        sampling.check_at_end(finite, NOT_FINITE)
    elif not bool(finite):
        raise InputError(NOT_FINITE)


def _checked(scores: Tensor) -> Tensor:
    require_finite(scores.isfinite().all())
    return scores


@torch.library.custom_op("dmoe_var::finite", mutates_args=(), schema="(Tensor scores) -> Tensor")
def _finite(scores: Tensor) -> Tensor:
    return _checked(scores).clone()


@_finite.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty_like(scores)
