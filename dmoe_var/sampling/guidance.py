"""Classifier-free guidance: its strength at each scale, and how long its unconditional half runs.

Legend: B images, R rows (2B: [cond; null]), l tokens of a scale, V vocabulary, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator
from torch import Tensor

from dmoe_var import values


def _given(cfg: Any) -> float | tuple[float, ...]:
    if values.is_list(cfg):
        return tuple(values.numbers("cfg", cfg, 0))
    return values.number("cfg", cfg, 0)


Cfg = Annotated[float | tuple[float, ...], BeforeValidator(_given)]
"""One value, or one per scale."""


def by_scale(cfg: Any, num_scales: int) -> tuple[float, ...]:
    """Return cfg at each scale; one value is that of all. Raise ValueError for another number."""
    given = _given(cfg)
    cfg_S = (given,) if isinstance(given, float) else given
    if len(cfg_S) == 1:
        return cfg_S * num_scales
    if len(cfg_S) != num_scales:
        raise ValueError(
            f"cfg={values.shown(cfg)} has {len(cfg_S)} values; allowed: 1, or one for each of "
            f"{num_scales} scales"
        )
    return cfg_S


def branches(cfg_S: Sequence[float]) -> tuple[int, ...]:
    """Return the rows per image at each scale: 2 up to the last scale whose cfg is not 0, then 1.

    An unguided scale before it still runs both, since later ones read its keys and values.
    """
    guided = [si for si, cfg in enumerate(cfg_S) if cfg != 0]
    last = guided[-1] if guided else -1
    return tuple(2 if si <= last else 1 for si in range(len(cfg_S)))


def text(cfg: float | Sequence[float]) -> str:
    """Write cfg for a title."""
    return ",".join(f"{each:g}" for each in ((cfg,) if isinstance(cfg, float) else cfg))


def guide(logits_RlV: Tensor, t: float) -> Tensor:
    """Guide stacked logits [cond; null] with strength t: (1 + t) cond - t null, (B, l, V)."""
    cond_BlV, null_BlV = logits_RlV.chunk(2)
    return (1 + t) * cond_BlV - t * null_BlV
