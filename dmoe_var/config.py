"""The root configuration: one frozen dataclass a section, each beside the code that reads it.

Scripts compose it with Hydra and convert it once, here; the library knows no Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from dmoe_var.calibration.config import CalibrateConfig
from dmoe_var.config_fields import STRICT, PathOrName, Scales, Seed, Share, Taus, as_tuple
from dmoe_var.conversion.pruning import PruningConfig
from dmoe_var.data import DataConfig
from dmoe_var.data.class_names import class_index
from dmoe_var.errors import ConfigError
from dmoe_var.figures.config import FiguresConfig
from dmoe_var.launcher import LauncherConfig
from dmoe_var.metrics.fidelity import ISC_SPLITS, FidelityConfig
from dmoe_var.models.var import VARConfig
from dmoe_var.models.vqvae import VQVAEConfig
from dmoe_var.moe.layer import ExpertConfig
from dmoe_var.moe.selection_config import SelectionConfig
from dmoe_var.report.config import ReportConfig
from dmoe_var.sampling.parts import ImageFormat
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.training.objectives import ConversionConfig, SparsifyConfig, VARTrainingConfig
from dmoe_var.training.router_objective import RouterConfig
from dmoe_var.training.tracking import WandbMode
from dmoe_var.training.vqvae_objective import VQVAETrainingConfig


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
class BaseConfig:
    """Where the base models come from: a path, a published name, or the name of one that this
    package carries ("digits"). None: they are trained (train_vqvae, train_var)."""

    __pydantic_config__ = STRICT

    vqvae: PathOrName | None = None
    var: PathOrName | None = None


@dataclass(frozen=True)
class MoEConfig:
    """At which scales experts run, and which compute path runs them."""

    __pydantic_config__ = STRICT

    scales: Scales = (7, 8, 9)
    impl: Literal["auto", "reference", "grouped", "native", "triton"] = "auto"


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


@dataclass(frozen=True)
class Config:
    """Everything a stage can read. `name` is the experiment's: results go to run_dir/name; `until`
    is the pipeline's last stage."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    run_dir: PathOrName = "runs"
    seed: Seed = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Annotated[int, Field(gt=0)] | None = None
    deterministic: bool = False
    wandb: WandbMode = "disabled"
    progress: bool = True
    until: Literal["train_vqvae", "train_var", "sparsify", "split", "train_router", "sweep"] = (
        "sweep"
    )
    data: DataConfig = field(default_factory=DataConfig)
    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    var: VARConfig = field(default_factory=VARConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    train_vqvae: VQVAETrainingConfig = field(default_factory=lambda: VQVAETrainingConfig(steps=1))
    train_var: VARTrainingConfig = field(default_factory=lambda: VARTrainingConfig(steps=1))
    conversion: ConversionConfig = field(default_factory=ConversionConfig)
    sparsify: SparsifyConfig = field(default_factory=lambda: SparsifyConfig(steps=1))
    split: ExpertConfig = field(default_factory=ExpertConfig)
    train_router: RouterConfig = field(default_factory=lambda: RouterConfig(steps=1))
    moe: MoEConfig = field(default_factory=MoEConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    maps: MapsConfig = field(default_factory=MapsConfig)
    figures: FiguresConfig = field(default_factory=FiguresConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        if self.name == "cache":
            raise ValueError("name=cache is where token caches go; choose another")
        self._check_models()
        self._check_fidelity()
        self._check_scales()
        self._check_selection()
        self._find_classes()

    def _check_models(self) -> None:
        for name in ("patch_nums", "vocab_size", "z_channels"):
            ours, theirs = getattr(self.var, name), getattr(self.vqvae, name)
            if ours != theirs:
                raise ValueError(f"var.{name}={ours} must equal vqvae.{name}={theirs}")
        if self.vqvae.image_size != self.data.image_size:
            raise ValueError(
                f"data.image_size={self.data.image_size} must equal the finest scale's "
                f"{self.vqvae.patch_nums[-1]} cells of {self.vqvae.downsampling} pixels"
            )
        if self.var.experts is not None:
            raise ValueError("var.experts must be null: experts come from the split stage")
        if self.var.hidden % self.split.expert_size:
            size, hidden = self.split.expert_size, self.var.hidden
            raise ValueError(f"split.expert_size={size} must divide the FFN's {hidden} neurons")
        if self.split.expert_size == self.var.hidden:
            size = self.split.expert_size
            raise ValueError(f"split.expert_size={size} makes one expert; at least 2 are needed")
        if not self.data.suits(self.var.num_classes):
            more = " or more" if self.data.kind == "image_folder" else ""
            raise ValueError(
                f"var.num_classes={self.var.num_classes} must be {self.data.known_classes()}{more},"
                f" the classes of the data (data.kind={self.data.kind})"
            )
        if max(self.report.labels or (0,)) >= self.var.num_classes:
            raise ValueError(
                f"report.labels={list(self.report.labels or ())} must be within "
                f"0..{self.var.num_classes - 1}"
            )

    def _check_fidelity(self) -> None:
        if self.fidelity.backbone == "inception":
            if self.evaluate.num_samples < ISC_SPLITS:
                raise ValueError(
                    f"evaluate.num_samples={self.evaluate.num_samples} must be at least "
                    f"{ISC_SPLITS} for fidelity.backbone=inception"
                )
            if self.fidelity.weights and not Path(self.fidelity.weights).is_file():
                raise ValueError(f"fidelity.weights={self.fidelity.weights}: no such file")
        if self.fidelity.precision_recall:
            neighbours = self.fidelity.neighbours
            for key, number in (
                ("evaluate.num_samples", self.evaluate.num_samples),
                ("fidelity.reference_images", self.fidelity.reference_images),
            ):
                if number <= neighbours:
                    raise ValueError(
                        f"{key}={number} must be greater than fidelity.neighbours={neighbours}"
                    )

    def _check_scales(self) -> None:
        last = self.var.num_scales - 1
        for key, scales in (
            ("moe.scales", self.moe.scales),
            ("train_router.scales", self.train_router.scales or ()),
            ("conversion.scales", self.conversion.scale_numbers(self.var.num_scales)),
        ):
            if max(scales, default=0) > last or list(scales) != sorted(set(scales)):
                raise ValueError(
                    f"{key}={list(scales)} must be distinct scales within 0..{last}, rising"
                )

    def _check_selection(self) -> None:
        lengths = {1, len(self.moe.scales), self.var.num_scales}
        if len(self.selection.tau) not in lengths:
            allowed = ", ".join(map(str, sorted(lengths)))
            raise ValueError(f"selection.tau={list(self.selection.tau)} must have {allowed} values")
        by_layer = self.selection.layer_tau
        lengths_by_scale = [len(taus) for taus in by_layer]
        if by_layer and lengths_by_scale != [self.var.depth] * len(self.moe.scales):
            raise ValueError(
                f"selection.layer_tau={[list(taus) for taus in by_layer]} must have "
                f"{len(self.moe.scales)} lists (moe.scales) of {self.var.depth} values (var.depth)"
            )
        num_experts = self.var.hidden // self.split.expert_size
        if self.selection.rule in ("top_k", "random") and self.selection.k > num_experts:
            raise ValueError(f"selection.k={self.selection.k} must be at most {num_experts}")

    @cached_property
    def leaves(self) -> Mapping[str, Any]:
        """Every key and its value, by dotted name; tuples as lists."""
        return dict(flatten(asdict(self)))

    def _find_classes(self) -> None:
        """Turns the names among `sample.classes` into indices."""
        given = self.sample.classes
        if given is None:
            return
        kind, num_classes = self.data.kind, self.var.num_classes
        found = tuple(class_index(each, kind, num_classes, "sample.classes") for each in given)
        if len(set(found)) != len(found):
            raise ValueError(f"sample.classes={list(given)} must be distinct classes")
        object.__setattr__(self, "sample", replace(self.sample, classes=found))


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _as_list(value)


def _as_list(value: Any) -> Any:
    return [_as_list(each) for each in value] if isinstance(value, tuple) else value


def parse_config(content: Mapping[str, Any]) -> Config:
    """The configuration of a nested mapping; ConfigError in one line for the first thing wrong."""
    try:
        return TypeAdapter(Config).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def describe(error: ValidationError) -> str:
    """One line: the key, its value, what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if first["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key; {known_keys(first['loc'][:-1], str(first['loc'][-1]))}"
    if first["type"].startswith("missing"):
        given = f" in {first['input']!r}" if isinstance(first["input"], list) else ""
        return f"{key}: missing{given}"
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={first['input']!r}: {message}"


def is_text(key: str) -> bool:
    """Whether the value of a dotted key is text and nothing else (a path, a name), or null."""
    return set(_kinds(_type_of(key.split(".")))) == {str}


def is_entry(key: str) -> bool:
    """Whether a dotted key lies in a section whose keys are the user's own (sweep.lists.mine)."""
    *path, _ = key.split(".")
    return typing.get_origin(_type_of(path)) is Mapping


def _type_of(path: Sequence[Any]) -> Any:
    """The type that a key is declared with; None for an unknown one."""
    found: Any = Config
    for part in path:
        if dataclasses.is_dataclass(found):
            found = typing.get_type_hints(found).get(str(part))
        elif typing.get_origin(found) is Mapping:
            found = typing.get_args(found)[1]
        else:
            return None
    return found


def _kinds(type_: Any) -> tuple[Any, ...]:
    """The members of a union without None."""
    union = typing.get_origin(type_) in (typing.Union, types.UnionType)
    members = typing.get_args(type_) if union else (type_,)
    return tuple(member for member in members if member is not types.NoneType)


def known_keys(path: tuple[Any, ...], wrong: str) -> str:
    """What a section allows, the likeliest meant key first."""
    section = _type_of(path)
    if not dataclasses.is_dataclass(section):
        return "it takes no keys"
    names = [f.name for f in dataclasses.fields(section)]
    close = difflib.get_close_matches(wrong, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"
