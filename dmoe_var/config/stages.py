"""Configure the stages that train nothing: what each script is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dmoe_var.config_fields import (
    STRICT,
    Distinct,
    Index,
    Listed,
    PathOrName,
    Positive,
    PositiveShare,
    Seed,
    Several,
    Share,
    Taus,
    as_tuple,
)
from dmoe_var.sampling.store import ImageFormat


def _as_classes(value: Any) -> Any:
    classes = as_tuple((value,) if isinstance(value, str) else value)
    types = {type(each) for each in classes} if isinstance(classes, tuple) else set()
    if not types or not types <= {int, str}:
        raise ValueError(f"{value!r} must be a class or a list of classes, by index or name")
    return classes


Classes = Annotated[tuple[int | str, ...], BeforeValidator(_as_classes)]


@dataclass(frozen=True)
class SampleConfig:
    """Which pictures scripts/sample.py samples."""

    __pydantic_config__ = STRICT

    classes: Classes | None = None
    """Classes by index or name; null samples all, at most ten."""
    seeds: Annotated[tuple[Seed, ...], Listed, Several, Distinct] = (0,)
    """Seeds under which each class is sampled."""
    per_class: Positive = 1
    """Pictures of each class under each seed."""
    single_pngs: bool = False
    """Whether each picture is also written as a PNG file of its own."""
    model: Literal["dense", "dynamic", "both"] | None = None
    """Models that sample; null takes both if the experts are made, else the dense one."""
    pretrained: PathOrName | None = None
    """Source of both models: a DynamicVAR of save_pretrained, as a folder or a name on the hub."""
    selection: Literal["stored", "given"] = "stored"
    """With pretrained: rule, means and recipe as they are stored with it, or as the configuration
    gives them (of means only whether they stand in)."""


@dataclass(frozen=True)
class EvaluateConfig:
    """One point of a quality-cost curve."""

    __pydantic_config__ = STRICT

    model: Literal["dense", "dynamic", "pruned"] = "dynamic"
    """Model: dense, dynamic (experts at moe.scales under `selection`) or pruned (narrower FFNs
    there, by `pruning`)."""
    num_samples: Annotated[int, Field(ge=2)] = 1000
    """Images that are sampled and measured."""
    seed: Seed = 0
    """Seed of the images."""
    format: ImageFormat = "npz"
    """How images are stored: npz (samples.npz), png (a file per image) or both."""
    samples: Annotated[str, Field(min_length=1)] | None = None
    """Given images to measure in place of a model's: an .npz file (arr_0) or a folder."""


@dataclass(frozen=True)
class ExportConfig:
    """What scripts/export.py does with the finished model."""

    __pydantic_config__ = STRICT

    push_to: Annotated[str, Field(min_length=1)] | None = None
    """Repository on the hub to push to, such as me/dmoe-var-d16; null pushes nothing."""
    private: bool = True
    """Whether a repository that is created is private."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What scripts/benchmark.py times: the dense model, beside it the dense model as published if
    `sampling` says otherwise, and whatever is named here."""

    __pydantic_config__ = STRICT

    batch_size: Positive = 1
    """Images per batch."""
    batch_sizes: Annotated[tuple[Positive, ...], Listed, Distinct] = ()
    """Several batch sizes, timed one by one in place of batch_size."""
    repeats: Positive = 5
    """Rounds that count; each times every model once."""
    warmup: Annotated[int, Field(ge=0)] = 1
    """Rounds before those, which do not count."""
    tau: Annotated[tuple[Share, ...], Listed, Distinct] = ()
    """Tau on all of moe.scales; a dynamic model is timed for each."""
    chosen: bool = False
    """Whether the dynamic model under `selection` is timed too."""
    random_masks: bool = False
    """Whether each dynamic model is also timed with random masks of the same density."""
    smaller: PathOrName | None = None
    """Dense model of less depth, timed too: a source as base.var, or next (the published below)."""
    compile: Literal["eager", "compiled", "both"] = "eager"
    """Models as they are (eager), with torch.compile (compiled), or both."""
    parts: bool = False
    """Whether parts and scales are timed too, which adds part_times.png."""
    published: PathOrName | None = None
    """Folder of a checkout of the published VAR code, timed beside ours."""
    kernels: bool = False
    """Whether a layer's FFN, with random weights, is timed by every path in place of samplers; on a
    GPU, unless batch_sizes says otherwise, also on the tokens of 64 images."""
    real_masks: bool = False
    """With kernels: also time the experiment's layers, on tokens and masks of sampled images."""
    expert_sizes: Annotated[tuple[Positive, ...], Listed, Several, Distinct] = (32, 128)
    """With kernels: neurons per expert."""
    densities: Annotated[tuple[PositiveShare, ...], Listed, Several, Distinct] = (
        1.0, 0.6, 0.3, 0.1,
    )  # fmt: skip
    """With kernels: densities, the shares of experts that run."""
    predict: Annotated[tuple[Literal["a100", "h100", "h200"], ...], Listed, Distinct] = ()
    """With kernels: GPUs for which the time of triton's kernels is predicted from what they are
    compiled to; none of them has to be there."""

    def __post_init__(self) -> None:
        if self.real_masks and not (self.kernels and self.dynamic):
            raise ValueError("real_masks=true needs kernels=true, and tau or chosen to draw by")
        if self.predict and not self.kernels:
            raise ValueError("predict needs kernels=true, whose shapes it is of")
        if self.random_masks and not (self.kernels or self.dynamic):
            raise ValueError("random_masks=true needs tau or chosen, whose density they have")

    @property
    def dynamic(self) -> bool:
        """Whether models with experts are timed."""
        return (self.real_masks or not self.kernels) and (bool(self.tau) or self.chosen)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes."""
        return self.batch_sizes or (self.batch_size,)


@dataclass(frozen=True)
class MapsConfig:
    """Maps of experts over the picture, under `selection` and under each tau."""

    __pydantic_config__ = STRICT

    images: Positive = 4
    """Number of classes, from the first on, with one image each."""
    seed: Seed = 0
    """Seed of the images."""
    tau: tuple[Share, ...] = (0.0, 0.1, 0.2, 0.4)
    """Tau on all of moe.scales that are shown beside `selection`."""


@dataclass(frozen=True)
class SweepConfig:
    """The points of a sweep: the dense model, tau grids and lists, each with every seed."""

    __pydantic_config__ = STRICT

    seeds: Annotated[tuple[Seed, ...], Several, Distinct] = (0,)
    """Seeds with which each point is measured."""
    last: Annotated[tuple[Share, ...], Distinct] = ()
    """Tau on all of moe.scales, one point each."""
    all: Annotated[tuple[Share, ...], Distinct] = ()
    """Tau on all scales, one point each."""
    lists: Mapping[str, Taus] = field(default_factory=dict)
    """Tau lists by name, one point each: a tau for each of moe.scales."""
    chosen: str | None = None
    """Name of the list that is the operating point."""
    part: Positive | None = None
    """Shard of the points that is measured, from 1; null joins them all."""
    parts: Positive = 1
    """Shards that the points are cut into."""

    def __post_init__(self) -> None:
        if self.part is None and self.parts > 1:
            raise ValueError(
                f"part=null: parts={self.parts} needs one, 1..{self.parts}; neither joins them all"
            )
        if self.part is not None and self.part > self.parts:
            raise ValueError(f"part={self.part} must be at most parts={self.parts}")
        if self.chosen is not None and self.chosen not in self.lists:
            known = ", ".join(self.lists) or "none"
            raise ValueError(f"chosen={self.chosen!r} is not among the lists ({known})")


@dataclass(frozen=True)
class CalibrateConfig:
    """What a calibration of tau aims at, and what it may take."""

    __pydantic_config__ = STRICT

    budget: PositiveShare = 0.81
    """FLOPs of an image as a share of the dense model's, decoder left out."""
    budget_ms: Annotated[float, Field(gt=0)] | None = None
    """In place of budget: milliseconds of a batch of time_batch images here, decoder included."""
    budgets: Annotated[tuple[PositiveShare, ...], Distinct] = ()
    """Budgets at which all ways to choose tau are compared; an empty list compares nothing."""
    loss: Literal["ce", "ce_tokens", "norm"] = "ce"
    """Loss made equal per saved FLOP: ce (teacher-forced, sparse scales weigh the same), ce_tokens
    (tokens weigh the same) or norm (predicted norms that are dropped)."""
    by_layer: bool = False
    """Whether each layer of a scale gets a tau of its own."""
    temperature: bool = False
    """Whether sampling.temperature is found too, at which the guided predictions of each sparse
    scale are as sharp as the dense model's (beyond the paper)."""
    densities: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Several, Distinct] = (
        0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1,
    )  # fmt: skip
    """Densities (shares of experts) at which the losses of a group are measured."""
    refinements: Annotated[int, Field(ge=0)] = 3
    """Rounds that measure the losses of all groups together; 0 trusts those of each alone."""
    images: Positive = 256
    """Training images on which losses are measured."""
    held_out: Positive = 256
    """Held-out images on which the result is verified."""
    drawn: Annotated[int, Field(ge=2)] = 200
    """Sampled images that correct and verify the FLOPs."""
    batch_size: Positive = 64
    """Images per batch."""
    time_batch: Positive = 8
    """Images per timed batch."""
    time_repeats: Positive = 5
    """Times that the batch is timed."""
    seed: Annotated[int, Field(ge=0, lt=2**30)] = 1000
    """Seed of the sampled images that correct the FLOPs; those that verify take the next one."""


@dataclass(frozen=True)
class ReportConfig:
    """What the HTML report shows, and how large it may grow."""

    __pydantic_config__ = STRICT

    labels: Annotated[tuple[Index, ...], Several, Distinct] | None = None
    """Classes under the router microscope, one picture each; null takes the first four."""
    seed: Seed = 0
    """Seed of these pictures."""
    tau: Annotated[tuple[Share, ...], Several] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    """Tau on all of moe.scales at which each picture is sampled."""
    grid_images: Positive = 20
    """First pictures that are shown per point of a curve, dense beside dynamic."""
    picture_side: Annotated[int, Field(ge=8)] = 256
    """Pixels per side of a picture under the microscope; larger ones are scaled down."""
    grid_side: Annotated[int, Field(ge=8)] = 96
    """Pixels per side of a picture in a grid; larger ones are scaled down, as JPEG."""
    max_mb: Annotated[float, Field(gt=0)] = 20.0
    """Largest page in MB; microscope pictures beyond it are left out, and the page says so."""

    def __post_init__(self) -> None:
        if list(self.tau) != sorted(set(self.tau)):
            raise ValueError(f"tau={list(self.tau)} must be distinct and rising")
