"""Time the compute paths of experts layer by layer, beside the fastest dense FFN and two limits.

All that is timed for a shape runs in turn, round by round, so that a machine that is busy for a
while slows all of it. Weights, tokens and masks are random, or a model's own as it samples.

Legend: N tokens, C width, H hidden width, E experts, D neurons of an expert.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe_var.devices import seconds_of
from dmoe_var.models.blocks import FFN
from dmoe_var.moe import at_once
from dmoe_var.moe.experts import paths_on, run_experts
from dmoe_var.moe.layer import ExpertConfig, MoEFFN
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import Threshold, random_mask
from dmoe_var.ops import linear
from dmoe_var.sampling.memory import keep_freed_memory
from dmoe_var.sampling_time import sampling

DENSE_TORCH, DENSE_OURS, SELECTION = "dense_torch", "dense", "selection"
LAYER, ROUTED = "layer", "routed"
"""Names of what is timed beside the paths: an FFN by torch's own Linear, one by the products that
the sampler uses (the faster is the baseline), router with threshold as a call of their own, the
whole expert layer as the sampler runs it (router, threshold and the path that `auto` takes), and
that path alone under the mask that the layer's router gives."""
SQUARE = 1536
"""Side of the product by which a device's rate is measured."""
COPIED = 1 << 28
"""Bytes of the copy by which its memory's rate is measured."""

Call = Callable[[], Any]
Case: TypeAlias = tuple[str, float | None]
"""What runs, and at which density."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Shape:
    """A layer on the tokens of one scale."""

    model: str
    width: int
    hidden: int
    expert_size: int
    tokens: int

    @property
    def num_experts(self) -> int:
        return self.hidden // self.expert_size

    def flops(self, density: float) -> float:
        """Count the FLOPs of both products, two per multiply-add."""
        return 4 * self.tokens * self.width * self.hidden * density

    def bytes(self, density: float, element: int) -> float:
        """Count what passes through memory once: weights, tokens, output, hidden rows both ways."""
        hidden = 2 * self.tokens * self.hidden * density
        return element * (2 * self.width * (self.hidden + self.tokens) + hidden)


@dataclass(frozen=True)
class Rates:
    """Rates that a device reaches here, in a large square product by the faster of torch and what
    the sampler uses, and in a copy."""

    gflops_per_s: float
    gbytes_per_s: float


def measured_rates(device: torch.device, dtype: torch.dtype, repeats: int) -> Rates:
    """Measure both rates by the best of a few calls; a copy reads and writes."""
    square = torch.ones(SQUARE, SQUARE, device=device, dtype=dtype)
    memory = torch.ones(COPIED, device=device, dtype=torch.uint8)
    copy = torch.empty_like(memory)
    with sampling():
        times = _in_turn(
            {
                "torch": lambda: square @ square,
                "ours": lambda: linear(square, square),
                "copy": lambda: copy.copy_(memory),
            },
            device,
            repeats,
        )
    best = {name: min(ms) / 1000 for name, ms in times.items()}
    product = min(best["torch"], best["ours"])
    return Rates(2 * SQUARE**3 / product / 1e9, 2 * COPIED / best["copy"] / 1e9)


@dataclass(frozen=True)
class Layer:
    """An expert FFN, its tokens, and one mask (N, E) per density."""

    ffn: MoEFFN
    x_NC: Tensor
    masks: Mapping[float, Tensor]
    taus: Mapping[float, float] = field(default_factory=dict)
    """The tau by which its own router makes as much run, for densities at which it is timed too."""

    def zeros(self, mask_NE: Tensor) -> float:
        """Return the share of hidden values that ReLU makes 0, in the experts that run."""
        h_NED = torch.einsum("nc,edc->ned", self.x_NC, self.ffn.w1_EDC) + self.ffn.b1_ED
        active_NE = (h_NED > 0).sum(-1)
        pairs = max(1, int(mask_NE.count_nonzero()))
        return 1 - int((active_NE * mask_NE).sum()) / (pairs * h_NED.shape[-1])

    def dense(self) -> FFN:
        """Build the same FFN in one piece."""
        w1_EDC, b1_ED, w2_EDC, b2_C = self.ffn.weights
        dense = FFN(w1_EDC.shape[-1], b1_ED.numel(), "relu")
        with torch.no_grad():
            dense.fc1.weight.copy_(w1_EDC.flatten(0, 1))
            dense.fc1.bias.copy_(b1_ED.flatten())
            dense.fc2.weight.copy_(w2_EDC.flatten(0, 1).T)
            dense.fc2.bias.copy_(b2_C)
        return dense.to(w1_EDC.device, w1_EDC.dtype)


def random_layer(
    shape: Shape,
    densities: Sequence[float],
    device: torch.device,
    dtype: torch.dtype,
    zeros: bool = True,
) -> Layer:
    """Make a layer with random weights and tokens. About half of its hidden values are 0; without
    `zeros` large biases leave none, so that no path can skip any."""
    generator = torch.Generator().manual_seed(0)
    ffn = MoEFFN(shape.width, shape.hidden, "relu", ExpertConfig(shape.expert_size))
    with torch.no_grad():
        for parameter in ffn.parameters():
            values = torch.rand(parameter.shape, generator=generator).sub_(0.5)
            parameter.copy_(values.mul_(2 * parameter.shape[-1] ** -0.5))
        if not zeros:
            ffn.b1_ED.fill_(shape.width**0.5)  # |x| <= 1/2, |w| <= C^-1/2
    x_NC = torch.rand(shape.tokens, shape.width, generator=generator).sub_(0.5)
    num_experts = shape.num_experts
    masks = {
        density: random_mask(density * num_experts, shape.tokens, num_experts, device)
        for density in densities
    }
    ffn, x_NC = ffn.to(device, dtype), x_NC.to(device, dtype)
    reached = [density for density in densities if density * num_experts >= 1]  # Eq. 3 runs one
    return Layer(ffn, x_NC, masks, {density: _tau_for(density, ffn, x_NC) for density in reached})


@torch.no_grad()
def _tau_for(density: float, ffn: MoEFFN, x_NC: Tensor) -> float:
    """Find the tau at which Eq. 3 lets a share of the experts run; more than 0, so that the router
    runs where all of them do."""
    scores_NE = ffn.router(x_NC).float()
    shares = (scores_NE / scores_NE.amax(-1, keepdim=True)).flatten()
    place = round((1 - density) * (len(shares) - 1))
    return max(float(shares.sort().values[place]), 1e-6)


def time_layers(
    shape: Shape, layers: Sequence[Layer], rates: Rates, repeats: int
) -> list[dict[str, Any]]:
    """Time all layers one after the other: a row per dense FFN, one for router and selection, one
    per path and density, and one per density for the whole layer if all of them have a tau.

    time_ratio: the median's ratio to the baseline's. limit_ratio: its lower bound for a path that
    multiplies every hidden value of the experts that run, from the larger of the times that the
    density leaves for the device's products and its memory. zeros: the share of those values that
    are 0. Rows with a router have neither. router_time_ratio: what a layer takes longer than its
    path alone, the median over rounds, as a share of the baseline. On a CPU it can be negative for
    few tokens: a layer is one call of the kernel, with less Python around it than a path alone has.
    captured_...: the same where CUDA graphs start the calls, so that the host takes no part.
    """
    x_NC = layers[0].x_NC
    if x_NC.device.type == "cpu":
        keep_freed_memory()  # as the sampler does
    with sampling():
        calls = _calls(layers)
        zeros = {
            density: sum(layer.zeros(layer.masks[density]) for layer in layers) / len(layers)
            for density in layers[0].masks
        }
        times = _in_turn(calls, x_NC.device, repeats, layers)
        captured = _in_turn(_captured(calls, x_NC.device), x_NC.device, repeats, layers)
    dtype = str(x_NC.dtype).removeprefix("torch.")
    about = {**asdict(shape), "layers": len(layers), "device": x_NC.device.type, "dtype": dtype}
    rows = [
        {**about, "impl": impl, "density": density, **_statistics(of_call)}
        | ({} if density is None or impl == LAYER else {"zeros": zeros[density]})
        for (impl, density), of_call in times.items()
        if impl != ROUTED
    ]
    for row in rows:
        case, without = (row["impl"], row["density"]), (ROUTED, row["density"])
        if case in captured:
            row["captured_ms_median"] = float(np.median(captured[case]))
        for prefix, found in (("", times), ("captured_", captured)):
            if row["impl"] == LAYER and case in found:
                added = np.subtract(found[case], found[without])
                row[f"{prefix}router_ms_median"] = float(np.median(added))
    return _beside_dense(shape, len(layers), rows, rates, x_NC.dtype.itemsize)


def _calls(layers: Sequence[Layer]) -> dict[Case, Call]:
    half = Routing(Threshold(0.5))
    denses = [(layer.x_NC, layer.dense()) for layer in layers]

    def by_torch(x_NC: Tensor, dense: FFN) -> Tensor:
        hidden_NH = F.relu(F.linear(x_NC, dense.fc1.weight, dense.fc1.bias))
        return F.linear(hidden_NH, dense.fc2.weight, dense.fc2.bias)

    def select(layer: Layer, routing: Routing) -> Tensor:
        x_BLC = layer.x_NC[None]
        found = at_once.select(layer.ffn, x_BLC, routing)
        return layer.ffn.select(x_BLC, routing)[0][0] if found is None else found.mask_NE

    calls: dict[Case, Call] = {
        (DENSE_TORCH, None): lambda: [by_torch(x_NC, dense) for x_NC, dense in denses],
        (DENSE_OURS, None): lambda: [dense(x_NC) for x_NC, dense in denses],
        (SELECTION, None): lambda: [select(layer, half) for layer in layers],
    }

    def experts(masks: Sequence[Tensor], impl: str) -> None:
        for layer, mask_NE in zip(layers, masks, strict=True):
            run_experts(layer.x_NC, mask_NE, layer.ffn.weights, layer.ffn.act, impl)

    def whole(routings: Sequence[Routing]) -> None:
        for layer, its_own in zip(layers, routings, strict=True):
            layer.ffn(layer.x_NC[None], its_own)

    device = layers[0].x_NC.device
    for density in layers[0].masks:
        masks = [layer.masks[density] for layer in layers]
        for impl, path in paths_on(device).items():
            if device.type != "cuda" or not path.waits:  # that would take dozens of dense FFNs
                calls[impl, density] = partial(experts, masks, impl)
        if all(density in layer.taus for layer in layers):
            routings = [Routing(Threshold(layer.taus[density])) for layer in layers]
            given = [select(*each) for each in zip(layers, routings, strict=True)]
            calls[LAYER, density] = partial(whole, routings)
            calls[ROUTED, density] = partial(experts, given, "auto")
    return calls


def _captured(calls: Mapping[Case, Call], device: torch.device) -> dict[Case, Call]:
    """Record calls that ran before as CUDA graphs; none on other devices."""
    found: dict[Case, Call] = {}
    for case, call in calls.items() if device.type == "cuda" else ():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        found[case] = graph.replay
    return found


def _in_turn(
    calls: Mapping[Key, Call], device: torch.device, repeats: int, layers: Sequence[Layer] = ()
) -> dict[Key, list[float]]:
    """Time each call in milliseconds, one value per round, after a round that does not count. Each
    round has another order: what a call leaves in the caches helps some, and hinders others. The
    layers' tokens are written anew before each is timed, as in a block: so caches hold them."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    written = [(layer.x_NC, layer.x_NC.clone()) for layer in layers]
    order, shuffled = list(calls.items()), random.Random(0)
    for round_ in range(1 + repeats):
        shuffled.shuffle(order)
        for key, call in order:
            for x_NC, values_NC in written:
                x_NC.copy_(values_NC)
            milliseconds = 1000 * seconds_of(call, device)
            if round_:
                times[key].append(milliseconds)
    return times


def _statistics(times: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = (float(q) for q in np.percentile(times, [10, 50, 90]))
    return {"ms_median": median, "ms_p10": p10, "ms_p90": p90, "ms_min": min(times)}


def _beside_dense(
    shape: Shape, layers: int, rows: Sequence[dict[str, Any]], rates: Rates, element: int
) -> list[dict[str, Any]]:
    """Add to the rows their ratios to the fastest dense one."""
    baselines = [row for row in rows if row["impl"] in (DENSE_TORCH, DENSE_OURS)]
    median, best = (min(row[key] for row in baselines) for key in ("ms_median", "ms_min"))
    captured = [row["captured_ms_median"] for row in baselines if "captured_ms_median" in row]
    bases = {"": median, "router_": median}
    if captured:
        bases |= {"captured_": min(captured), "captured_router_": min(captured)}
    for row in rows:
        for prefix, base in bases.items():
            if (milliseconds := row.get(f"{prefix}ms_median")) is not None:
                row[f"{prefix}time_ratio"] = milliseconds / base
        row["time_ratio_of_fastest"] = row["ms_min"] / best
        if row["impl"] in (SELECTION, LAYER):  # routers' products are not counted
            continue
        density = 1.0 if row["density"] is None else row["density"]
        row["gflops_per_s"] = layers * shape.flops(density) / row["ms_median"] / 1e6
        of_products = layers * shape.flops(density) / rates.gflops_per_s / 1e6
        of_memory = layers * shape.bytes(density, element) / rates.gbytes_per_s / 1e6
        row["rate"] = row["gflops_per_s"] / rates.gflops_per_s
        row["limit_ratio"] = max(of_products, of_memory) / median
    return list(rows)
