"""CUDA graphs: all that the transformer does for one scale, recorded once and then started at once.

A scale is hundreds of short operators. For few images a GPU is done with each before the host has
started the next. A graph takes their place: the same operators on the same memory, started by one
call. Drawing and the quantiser stay outside of it.

Legend: B images, R rows of the transformer's batch, l tokens of a scale, V vocabulary, Cvae latent
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dmoe_var.models.plan import Step
from dmoe_var.moe.observer import Observer, Routed
from dmoe_var.sampling_time import Check, this_sampling

Predict = Callable[[Step, Mapping[int, Tensor]], Tensor]
"""Runs a step of a plan on its inputs by scale, (B, p*p, Cvae); logits (R, l, V)."""


class _Shown(Observer):
    """Keeps what expert FFNs show while they are recorded."""

    def __init__(self) -> None:
        self.routed: list[Routed] = []

    def on_routing(self, routed: Routed) -> None:
        self.routed.append(routed)


@dataclass(frozen=True)
class _Recorded:
    """A step's graph, with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[int, Tensor]
    logits_RlV: Tensor
    routed: list[Routed]
    checks: list[Check]


@dataclass
class _Recording:
    """The graphs of a plan's steps over one pool of memory. What is freed after one step serves the
    next, so they are started in order."""

    labels_R: Tensor
    predict: Predict
    shown: _Shown
    stream: torch.cuda.Stream
    """Where all of them are recorded: what one stream frees, another cannot take."""
    steps: list[_Recorded] = field(default_factory=list)
    broken: bool = False
    """Whether recording a step failed, after which no further one can be."""
    images: int = 0
    """How many batches were begun."""

    def record(self, step: Step, inputs: Mapping[int, Tensor]) -> None:
        """Record the next step; nothing runs."""
        this, device = this_sampling(), self.labels_R.device
        assert this is not None
        pool = self.steps[0].graph.pool() if self.steps else None
        checked, graph = len(this.checks), torch.cuda.CUDAGraph()
        self.shown.routed = []
        self.broken = True
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.cuda.device(device),
            # If recording fails torch leaves its own stream in place: this takes it back.
            torch.cuda.stream(torch.cuda.current_stream(device)),
        ):
            own = {si: given.clone() for si, given in inputs.items()}
            with torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"):
                logits_RlV = self.predict(step, own)
        self.broken = False
        checks, this.checks[checked:] = this.checks[checked:], []
        self.steps.append(_Recorded(graph, own, logits_RlV, self.shown.routed, checks))


class CudaGraphs:
    """Keeps what `generate(..., graphs=...)` has recorded, as long as it lives.

    The first call of a kind runs as usual, the second records, and all later ones start what was
    recorded. A kind is a model, the number of images, the scales that are guided, the rules, the
    path, and what else of the call the transformer depends on. Classes, seeds, the strength of
    guidance, top_k and top_p may differ. Between calls values may be written into weights, but
    modules and hooks stay what they were when the kind was recorded.

    Each kind holds its model, activations, logits and K/V cache in the GPU's memory. An observer is
    shown tensors there, which the next call overwrites. One thread at a time may use them.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, _Recording | None] = {}
        self._begun: Hashable = None

    def start(
        self,
        kind: Hashable,
        model: nn.Module,
        labels_R: Tensor,
        observer: Observer | None,
        build: Callable[[Tensor, Observer | None], Predict],
    ) -> Predict:
        """Begin a batch; return what runs its steps, in order.

        kind: what the operators depend on beside the model, whose weights must be where they were,
        and the number of rows. build: makes what runs the steps, from the rows' classes and an
        observer in the layers.
        """
        places = (_places(each) for each in (*model.parameters(), *model.buffers()))
        tf32 = torch.backends.cuda.matmul.allow_tf32
        self._begun = key = (kind, model, len(labels_R), observer is None, tf32, *places)
        if key not in self._seen:
            return build(labels_R, observer)
        recording = self._seen[key]
        if recording is None or recording.broken:
            with torch.inference_mode(False):
                own, shown = labels_R.clone(), _Shown()
            predict = build(own, None if observer is None else shown)
            stream = torch.cuda.Stream(labels_R.device)
            recording = self._seen[key] = _Recording(own, predict, shown, stream)
        recording.labels_R.copy_(labels_R)
        return _Replay(recording, observer)

    def finish(self) -> None:
        """End a batch that went well: from now on calls of its kind are recorded."""
        self._seen.setdefault(self._begun, None)


def _places(weight: Tensor) -> Hashable:
    """Return where a weight lies, or the tensors that a quantised one is made of."""
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return tuple(_places(getattr(weight, name)) for name in names)
    return weight.data_ptr()


class _Replay:
    """Starts the steps of a recording, and records those that are missing."""

    def __init__(self, recording: _Recording, observer: Observer | None):
        recording.images += 1
        self._recording, self._observer, self._next = recording, observer, 0
        self._turn = recording.images

    def __call__(self, step: Step, inputs: Mapping[int, Tensor]) -> Tensor:
        this, steps = this_sampling(), self._recording.steps
        assert this is not None
        if self._turn != self._recording.images:
            raise RuntimeError("another call of generate used these graphs meanwhile")
        if self._next == len(steps):
            self._recording.record(step, inputs)
        recorded = steps[self._next]
        self._next += 1
        for si, given in inputs.items():
            recorded.inputs[si].copy_(given)
        recorded.graph.replay()
        this.checks += recorded.checks
        if self._observer is not None:
            for routed in recorded.routed:
                self._observer.on_routing(routed)
        return recorded.logits_RlV
