"""Classifier-free guidance: its strength at each scale, and how long its unconditional half runs.

Legend: B images, R rows (2B: [cond; null]), l tokens of a scale, V vocabulary, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator
from torch import Tensor

from dmoe_var import values

STRONGEST = 1000
"""Guided logits stay finite up to it, and what is drawn has long been the same whatever cfg is."""


def _given(cfg: Any) -> float | tuple[float, ...]:
    return values.one_or_several("cfg", cfg, 0, STRONGEST)


Cfg = Annotated[float | tuple[float, ...], BeforeValidator(_given)]
"""One value, or one per scale. Scale si of S is guided with strength cfg si / (S - 1)."""


def by_scale(cfg: Any, num_scales: int, name: str = "cfg") -> tuple[float, ...]:
    """Return cfg at each scale; one value is that of all. Raise ValueError for another number."""
    return values.by_scale(name, cfg, num_scales, 0, STRONGEST)


def strengths(cfg: Any, num_scales: int) -> tuple[float, ...]:
    """Return the strength with which each scale is guided, see `Cfg`."""
    last = max(num_scales - 1, 1)
    return tuple(each * (si / last) for si, each in enumerate(by_scale(cfg, num_scales)))


def branches(cfg_S: Sequence[float]) -> tuple[int, ...]:
    """Return the rows per image at each scale: 2 up to the last scale that is guided, then 1.

    An unguided scale before it, as the first one always is, still runs both, since later ones read
    its keys and values.
    """
    guided = [si for si, cfg in enumerate(cfg_S) if si > 0 and cfg != 0]
    last = guided[-1] if guided else -1
    return tuple(2 if si <= last else 1 for si in range(len(cfg_S)))


def text(cfg: float | Sequence[float]) -> str:
    """Write cfg for a title."""
    return ",".join(f"{each:g}" for each in ((cfg,) if isinstance(cfg, float) else cfg))


def guide(logits_RlV: Tensor, t: float | Tensor) -> Tensor:
    """Guide stacked logits [cond; null] with strength t, one or of each token (l, 1):
    (1 + t) cond - t null, (B, l, V)."""
    cond_BlV, null_BlV = logits_RlV.chunk(2)
    return (1 + t) * cond_BlV - t * null_BlV
