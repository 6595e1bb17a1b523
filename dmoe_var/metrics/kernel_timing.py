"""Compute paths of experts timed on one layer, beside the fastest dense FFN and two limits.

All that is timed of a shape runs in turn, round by round, so that a machine that is busy for a
while is so for all. Weights, tokens and masks are random.

Legend: N tokens, C width, H hidden width, E experts, D neurons of an expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe_var.devices import synchronise
from dmoe_var.metrics.random_masks import random_mask
from dmoe_var.models.blocks import FFN
from dmoe_var.models.products import sampling
from dmoe_var.moe.experts import paths_on, run_experts
from dmoe_var.moe.layer import ExpertConfig, MoEFFN, Routing
from dmoe_var.moe.selection import Threshold

DENSE_TORCH, DENSE_OURS, SELECTION = "dense_torch", "dense", "selection"
"""An FFN by torch's own Linear and by the products that the sampler uses, of which the faster is
the baseline; router and threshold."""
SQUARE = 1536
"""Side of the product by which a device's rate is measured."""
COPIED = 1 << 28
"""Bytes of the copy by which its memory's is."""

Call = Callable[[], Any]
Case: TypeAlias = tuple[str, float | None]
"""What runs, and at which density."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Shape:
    """One layer on the tokens of one scale."""

    model: str
    width: int
    hidden: int
    expert_size: int
    tokens: int

    @property
    def num_experts(self) -> int:
        return self.hidden // self.expert_size

    def flops(self, density: float) -> float:
        """Of both products, two for a multiply-add."""
        return 4 * self.tokens * self.width * self.hidden * density

    def bytes(self, density: float, element: int) -> float:
        """What has to pass through memory once: weights, tokens, output, hidden rows both ways."""
        hidden = 2 * self.tokens * self.hidden * density
        return element * (2 * self.width * (self.hidden + self.tokens) + hidden)


@dataclass(frozen=True)
class Rates:
    """What a device reaches here: of a large square product, and of a copy."""

    gflops_per_s: float
    gbytes_per_s: float


def measured_rates(device: torch.device, dtype: torch.dtype, repeats: int) -> Rates:
    """The best of a few calls each; a copy reads and writes."""
    square = torch.ones(SQUARE, SQUARE, device=device, dtype=dtype)
    memory = torch.ones(COPIED, device=device, dtype=torch.uint8)
    copy = torch.empty_like(memory)
    with sampling():
        times = _in_turn(
            {"product": lambda: square @ square, "copy": lambda: copy.copy_(memory)},
            device,
            repeats,
        )
    best = {name: min(ms) / 1000 for name, ms in times.items()}
    return Rates(2 * SQUARE**3 / best["product"] / 1e9, 2 * COPIED / best["copy"] / 1e9)


def time_kernels(
    shape: Shape,
    densities: Sequence[float],
    rates: Rates,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[dict[str, Any]]:
    """A row for each dense FFN, for router and selection, and for each path at each density.

    time_ratio is that of medians to the baseline's. limit_ratio is what no path could go below:
    the more of the two times that the density leaves of the device's products and of its memory.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(parameter: Tensor) -> None:
        values = torch.rand(parameter.shape, generator=generator).sub_(0.5)
        parameter.copy_(values.mul_(2 * parameter.shape[-1] ** -0.5))

    with torch.no_grad():
        ffn = MoEFFN(shape.width, shape.hidden, "relu", ExpertConfig(shape.expert_size))
        for parameter in ffn.parameters():
            uniform(parameter)
        x_NC = torch.rand(shape.tokens, shape.width, generator=generator).sub_(0.5)
        dense = FFN(shape.width, shape.hidden, "relu")
        dense.fc1.weight.copy_(ffn.w1_EDC.flatten(0, 1))
        dense.fc1.bias.copy_(ffn.b1_ED.flatten())
        dense.fc2.weight.copy_(ffn.w2_EDC.flatten(0, 1).T)
        dense.fc2.bias.copy_(ffn.b2_C)
    ffn, dense, x_NC = ffn.to(device, dtype), dense.to(device, dtype), x_NC.to(device, dtype)
    calls = _calls(shape, ffn, dense, x_NC, densities)
    with sampling():
        times = _in_turn(calls, device, repeats)
    about = {**asdict(shape), "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    rows = [
        {**about, "impl": impl, "density": density, **_statistics(of_call)}
        for (impl, density), of_call in times.items()
    ]
    return _beside_dense(shape, rows, rates, dtype.itemsize)


def _calls(
    shape: Shape, ffn: MoEFFN, dense: FFN, x_NC: Tensor, densities: Sequence[float]
) -> dict[Case, Call]:
    w1, b1, w2, b2 = dense.fc1.weight, dense.fc1.bias, dense.fc2.weight, dense.fc2.bias
    routing = Routing(Threshold(0.5))
    calls: dict[Case, Call] = {
        (DENSE_TORCH, None): lambda: F.linear(F.relu(F.linear(x_NC, w1, b1)), w2, b2),
        (DENSE_OURS, None): lambda: dense(x_NC),
        (SELECTION, None): lambda: ffn.select(x_NC[None], routing),
    }
    for density in densities:
        mean = density * shape.num_experts
        mask_NE = random_mask(mean, shape.tokens, shape.num_experts, x_NC.device)
        for impl in paths_on(x_NC.device):
            given = (x_NC, mask_NE, ffn.weights, ffn.act, impl)
            calls[impl, density] = partial(run_experts, *given)
    return calls


def _in_turn(
    calls: Mapping[Key, Call], device: torch.device, repeats: int
) -> dict[Key, list[float]]:
    """Milliseconds of each call, one value a round, after a round that does not count."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for round_ in range(1 + repeats):
        for key, call in calls.items():
            synchronise(device)
            started = time.perf_counter()
            call()
            synchronise(device)
            if round_:
                times[key].append(1000 * (time.perf_counter() - started))
    return times


def _statistics(times: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = (float(q) for q in np.percentile(times, [10, 50, 90]))
    return {"ms_median": median, "ms_p10": p10, "ms_p90": p90, "ms_min": min(times)}


def _beside_dense(
    shape: Shape, rows: Sequence[dict[str, Any]], rates: Rates, element: int
) -> list[dict[str, Any]]:
    """The rows with their ratios to the fastest dense one."""
    baselines = [row for row in rows if row["impl"] in (DENSE_TORCH, DENSE_OURS)]
    median, best = (min(row[key] for row in baselines) for key in ("ms_median", "ms_min"))
    for row in rows:
        row["time_ratio"] = row["ms_median"] / median
        row["time_ratio_of_fastest"] = row["ms_min"] / best
        if row["impl"] == SELECTION:
            continue
        density = 1.0 if row["density"] is None else row["density"]
        row["gflops_per_s"] = shape.flops(density) / row["ms_median"] / 1e6
        of_products = shape.flops(density) / rates.gflops_per_s / 1e6
        of_memory = shape.bytes(density, element) / rates.gbytes_per_s / 1e6
        row["rate"] = row["gflops_per_s"] / rates.gflops_per_s
        row["limit_ratio"] = max(of_products, of_memory) / median
    return list(rows)
