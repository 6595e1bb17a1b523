"""The sections of the stages that train nothing: what each script is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dmoe_var.config_fields import STRICT, PathOrName, Seed, Share, Taus, as_tuple
from dmoe_var.sampling.store import ImageFormat


def _as_classes(value: Any) -> Any:
    classes = as_tuple((value,) if isinstance(value, str) else value)
    if not isinstance(classes, tuple) or not classes:
        raise ValueError(f"{value!r} must be a class or a list of classes")
    for each in classes:
        if isinstance(each, bool) or not isinstance(each, int | str):
            raise ValueError(f"{each!r} must be the index or the name of a class")
    return classes


Classes = Annotated[tuple[int | str, ...], BeforeValidator(_as_classes)]


@dataclass(frozen=True)
class SampleConfig:
    """scripts/sample.py: `per_class` images of each class under each seed."""

    __pydantic_config__ = STRICT

    classes: Classes | None = None
    """By index or name; `Config` turns names into indices. None: all classes, at most ten."""
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (0,)
    per_class: Annotated[int, Field(gt=0)] = 1
    single_pngs: bool = False
    model: Literal["dense", "dynamic", "both"] | None = None
    """None: both where the experts are made, else dense alone (see stages/sample.py)."""
    pretrained: PathOrName | None = None
    """A DynamicVAR that `save_pretrained` wrote, a folder or a name on the hub; both models come
    from it then."""
    selection: Literal["stored", "given"] = "stored"
    """With `pretrained`: the rule that is stored with it, or the one under `selection`."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} must be distinct")


@dataclass(frozen=True)
class EvaluateConfig:
    """One point of a quality-cost curve: which model, how many samples, from which seed, and
    whether they are left as samples.npz, as PNG files or as both.

    model: dense; dynamic, with experts at `moe.scales` under `selection`; or pruned, with FFNs
    there that `pruning` made narrower. samples: an .npz file (arr_0) or a folder of somebody's
    images, which are measured in place of a model's; all other keys here are without effect then.
    """

    __pydantic_config__ = STRICT

    model: Literal["dense", "dynamic", "pruned"] = "dynamic"
    num_samples: Annotated[int, Field(ge=2)] = 1000
    seed: Seed = 0
    format: ImageFormat = "npz"
    samples: Annotated[str, Field(min_length=1)] | None = None


@dataclass(frozen=True)
class ExportConfig:
    """scripts/export.py: a repository on the hub to push the finished model to (None: none)."""

    __pydantic_config__ = STRICT

    push_to: Annotated[str, Field(min_length=1)] | None = None
    private: bool = True


@dataclass(frozen=True)
class BenchmarkConfig:
    """scripts/benchmark.py: the dense model, and beside it whatever else is named here, in turn.

    batch_sizes: images at once, each size by itself (none: `batch_size` alone). tau: a dynamic
    model for each, on all of `moe.scales`; chosen: another under `selection`. random_masks: each
    dynamic one also with experts by chance, as many. smaller: a dense model of less depth, as
    base.var ("next": the published one below). compile: with torch.compile, without, or both.
    parts: times by part and scale as well. published: a checkout of the published VAR code.
    kernels: instead of samplers, a layer's FFN by every compute path, with random weights: experts
    of expert_sizes, random masks of densities, tokens of each of `moe.scales`. real_masks: beside
    them the experiment's own layers, on what they are given as images are drawn at each tau.
    """

    __pydantic_config__ = STRICT

    batch_size: Annotated[int, Field(gt=0)] = 1
    batch_sizes: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(as_tuple)
    ] = ()  # fmt: skip
    repeats: Annotated[int, Field(gt=0)] = 5
    warmup: Annotated[int, Field(ge=0)] = 1
    tau: Annotated[
        tuple[Share, ...], BeforeValidator(as_tuple)
    ] = ()  # fmt: skip
    chosen: bool = False
    random_masks: bool = False
    smaller: PathOrName | None = None
    compile: Literal["eager", "compiled", "both"] = "eager"
    parts: bool = False
    published: PathOrName | None = None
    kernels: bool = False
    real_masks: bool = False
    expert_sizes: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = (32, 128)  # fmt: skip
    densities: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (1.0, 0.6, 0.3, 0.1)

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "tau", "expert_sizes", "densities"):
            values = getattr(self, name)
            if len({f"{value:g}" for value in values}) != len(values):
                raise ValueError(f"{name}={list(values)} must be distinct to six digits")
        if self.real_masks and not (self.kernels and self.dynamic):
            raise ValueError("real_masks=true needs kernels=true, and tau or chosen to draw by")
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
    """Experts over the picture: one image of each of the first `images` classes, under
    `selection` and under each of these tau on all sparse scales."""

    __pydantic_config__ = STRICT

    images: Annotated[int, Field(gt=0)] = 4
    seed: Seed = 0
    tau: tuple[Share, ...] = (0.0, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class SweepConfig:
    """The points of a sweep: the dense model, tau grids and lists, each with every seed.

    last: tau values on `moe.scales`. all: tau values on all scales. lists: tau lists by name, a
    value for each of `moe.scales`. chosen: the name of the list that is the operating point.

    part of parts: only this share of the points is measured (from 1), and nothing is joined.
    """

    __pydantic_config__ = STRICT

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    last: tuple[Share, ...] = ()
    all: tuple[Share, ...] = ()
    lists: Mapping[str, Taus] = field(default_factory=dict)
    chosen: str | None = None
    part: Annotated[int, Field(gt=0)] | None = None
    parts: Annotated[int, Field(gt=0)] = 1

    def __post_init__(self) -> None:
        if self.part is None and self.parts > 1:
            raise ValueError(
                f"part=null: parts={self.parts} needs one, 1..{self.parts}; neither joins them all"
            )
        if self.part is not None and self.part > self.parts:
            raise ValueError(f"part={self.part} must be at most parts={self.parts}")
        for name in ("seeds", "last", "all"):
            values = getattr(self, name)
            if len({f"{value:g}" for value in values}) != len(values):
                raise ValueError(f"{name}={list(values)} must be distinct to six digits")
        if self.chosen is not None and self.chosen not in self.lists:
            known = ", ".join(self.lists) or "none"
            raise ValueError(f"chosen={self.chosen!r} is not among the lists ({known})")
