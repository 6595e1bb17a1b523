"""Define the root configuration: one frozen dataclass per section, beside the code that reads it.

Scripts compose it with Hydra and convert it once, here; the library knows no Hydra.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dmoe_var.config.figures import FiguresConfig
from dmoe_var.config.recipe import FindRecipeConfig
from dmoe_var.config.stages import (
    BenchmarkConfig,
    CalibrateConfig,
    EvaluateConfig,
    ExportConfig,
    MapsConfig,
    ReportConfig,
    SampleConfig,
    SweepConfig,
)
from dmoe_var.config_fields import STRICT, Index, PathOrName, Positive, Scales, Seed
from dmoe_var.conversion.pruning import PruningConfig
from dmoe_var.data.class_names import class_index
from dmoe_var.data.config import DataConfig
from dmoe_var.launcher import LauncherConfig
from dmoe_var.metrics.fidelity import ISC_SPLITS, FidelityConfig
from dmoe_var.models import guidance
from dmoe_var.models.var import VARConfig
from dmoe_var.models.vqvae import VQVAEConfig
from dmoe_var.moe.experts import Impl
from dmoe_var.moe.layer import SplitConfig
from dmoe_var.moe.selection import SelectionConfig
from dmoe_var.moe.tau_schedule import by_scale, check_configured
from dmoe_var.sampling import token_sampling
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.training.classifier_objective import ClassifierTrainingConfig
from dmoe_var.training.objectives import ConversionConfig, SparsifyConfig, VARTrainingConfig
from dmoe_var.training.router_objective import RouterConfig
from dmoe_var.training.tracking import WandbMode
from dmoe_var.training.tuning_objective import TuneConfig
from dmoe_var.training.vqvae_objective import VQVAETrainingConfig


@dataclass(frozen=True)
class BaseConfig:
    """Where the base models come from: a path, a published name, or the name of one that this
    package carries ("digits")."""

    __pydantic_config__ = STRICT

    vqvae: PathOrName | None = None
    """Source of the VQ-VAE; null trains one (train_vqvae)."""
    var: PathOrName | None = None
    """Source of the dense VAR; null trains one (train_var)."""
    classifier: PathOrName | None = None
    """Source of the classifier that sees labels; null trains one (train_classifier)."""


@dataclass(frozen=True)
class DrafterConfig:
    """A model that draws the first scales in place of the one that all else describes, which draws
    the rest (see `models.collaborative_var`)."""

    __pydantic_config__ = STRICT

    var: PathOrName | None = None
    """Source of the drafter, a dense VAR of any depth and width, as base.var; null drafts
    nothing."""
    scales: Index | None = None
    """How many scales it draws, from the first on."""

    def __post_init__(self) -> None:
        if (self.var is None) != (self.scales is None):
            raise ValueError(f"var={self.var} and scales={self.scales} must both be given, or none")


@dataclass(frozen=True)
class MoEConfig:
    """Where experts run, and how."""

    __pydantic_config__ = STRICT

    scales: Scales = (7, 8, 9)
    """Scales at which experts run, from 0, rising; the dense model runs at the others."""
    impl: Impl = "auto"
    """Compute path of the experts: auto (the fastest here), native, triton, grouped or
    reference."""
    skipped: Literal["zero", "mean"] = "zero"
    """What stands for an expert that does not run: zero, as in the paper, or the mean of its output
    on the tokens that skip it."""
    mean_images: Positive = 256
    """Training images over which these means are taken."""


@dataclass(frozen=True)
class Config:
    """Everything a stage can read."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the experiment; results go to run_dir/name."""
    run_dir: PathOrName = "runs"
    """Folder of all experiments, and of the caches that they share."""
    seed: Seed = 0
    """Seed of initialisation, training and the split; samples have their own seeds."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """Device: auto, cpu, mps, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of training; bfloat16 trains under autocast."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads; null follows the cores that this process may use."""
    deterministic: bool = False
    """Whether a GPU gives bitwise the same weights at every run, which is slower."""
    wandb: WandbMode = "disabled"
    """Whether Weights & Biases gets the lines of metrics.jsonl: disabled, offline or online."""
    progress: bool = True
    """Whether progress bars are shown."""
    max_file_mb: Positive | None = None
    """Most megabytes (10^6 bytes) per file of a stage's checkpoint or a training's state; null does
    not limit it. What does not fit lies in pieces beside the file."""
    until: Literal[
        "train_vqvae", "train_var", "sparsify", "split", "train_router", "tune_experts", "sweep"
    ] = "sweep"
    """Last stage that scripts/pipeline.py runs."""
    data: DataConfig = field(default_factory=DataConfig)
    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    var: VARConfig = field(default_factory=VARConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    train_vqvae: VQVAETrainingConfig = field(default_factory=lambda: VQVAETrainingConfig(steps=1))
    train_var: VARTrainingConfig = field(default_factory=lambda: VARTrainingConfig(steps=1))
    conversion: ConversionConfig = field(default_factory=ConversionConfig)
    sparsify: SparsifyConfig = field(default_factory=lambda: SparsifyConfig(steps=1))
    split: SplitConfig = field(default_factory=SplitConfig)
    train_router: RouterConfig = field(default_factory=lambda: RouterConfig(steps=1))
    tune_experts: TuneConfig = field(default_factory=TuneConfig)
    train_classifier: ClassifierTrainingConfig = field(default_factory=ClassifierTrainingConfig)
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
    find_recipe: FindRecipeConfig = field(default_factory=FindRecipeConfig)
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
        if self.train_var.start is not None and self.base.var is not None:
            raise ValueError(
                f"train_var.start={self.train_var.start}: nothing is trained, base.var="
                f"{self.base.var} is given; allowed with it: null"
            )
        if self.var.experts is not None:
            raise ValueError("var.experts must be null: experts come from the split stage")
        size, hidden = self.split.expert_size, self.var.hidden
        if hidden % size or size == hidden:
            raise ValueError(
                f"split.expert_size={size} must divide the FFN's {hidden} neurons into at least two"
            )
        if not self.data.suits(self.var.num_classes):
            more = " or more" if self.data.kind == "image_folder" else ""
            raise ValueError(
                f"var.num_classes={self.var.num_classes} must be {self.data.known_classes()}{more},"
                f" the classes of the data (data.kind={self.data.kind})"
            )
        named = len(self.data.class_names)
        if named not in (0, self.var.num_classes):
            raise ValueError(
                f"data.class_names={list(self.data.class_names)} must be none, or as many as "
                f"var.num_classes={self.var.num_classes}"
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
        try:
            guidance.by_scale(self.sampling.cfg, self.var.num_scales)
            token_sampling.by_scale(self.sampling.temperature, self.var.num_scales)
            self.sampling.skipping.check(self.var.num_scales, self.var.depth)
            self.sampling.heads.check(self.var.num_scales)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from error
        if self.sampling.heads.scales and self.sampling.int8 != "none":
            raise ValueError(
                f"sampling.heads.ratios={list(self.sampling.heads.ratios)}: sampling.int8="
                f"{self.sampling.int8} holds projections in 8 bits, without heads; allowed: none"
            )
        tuned = (self.tune_experts.guidance, self.var.num_scales)
        guidance.by_scale(*tuned, "tune_experts.guidance")
        if (self.drafter.scales or 0) > self.var.num_scales:
            raise ValueError(
                f"drafter.scales={self.drafter.scales} must be within 0..{self.var.num_scales}"
            )
        if self.drafter.var is not None and self.sampling.skipping.scales:
            raise ValueError(
                f"sampling.skipping.ratios={list(self.sampling.skipping.ratios)}: drafter.var="
                f"{self.drafter.var} and its refiner skip no tokens; allowed: none"
            )
        weights = self.train_var.scale_weights
        if weights is not None and (len(weights) != self.var.num_scales or not any(weights)):
            raise ValueError(
                f"train_var.scale_weights={list(weights)}: allowed are null, or a number for each "
                f"of {self.var.num_scales} scales, not all of them 0"
            )
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
        num_experts = self.var.hidden // self.split.expert_size
        check_configured(
            self.selection, self.var.num_scales, self.moe.scales, self.var.depth, num_experts
        )
        skipping = self.sampling.skipping
        if skipping.scales and skipping.measure == "router":
            outside = sorted({*skipping.scales} - {*self.moe.scales})
            why = f"no experts at {outside} (moe.scales={list(self.moe.scales)})" if outside else ""
            if not self.selection.kind.needs_router:
                why = f"selection.rule={self.selection.rule} runs no router"
            if why:
                raise ValueError(f"sampling.skipping.measure=router: {why}; allowed: distance")
        if self.tune_experts.on:
            tau = self.tune_experts.tau
            by_scale(f"tune_experts.tau={list(tau)}", tau, self.var.num_scales, self.moe.scales)

    @property
    def expert_stage(self) -> str:
        """The stage that leaves the experts in use."""
        return "tune_experts" if self.tune_experts.on else "train_router"

    @cached_property
    def leaves(self) -> Mapping[str, Any]:
        """Every key and its value, by dotted name; tuples as lists."""
        return dict(flatten(asdict(self)))

    def _find_classes(self) -> None:
        """Turn the names among `sample.classes` into indices."""
        given = self.sample.classes
        if given is None:
            return
        named = (self.data, self.var.num_classes, "sample.classes")
        found = tuple(class_index(each, *named) for each in given)
        if len(set(found)) != len(found):
            raise ValueError(f"sample.classes={list(given)} must be distinct classes")
        object.__setattr__(self, "sample", replace(self.sample, classes=found))


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of every leaf."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _as_list(value)


def _as_list(value: Any) -> Any:
    return [_as_list(each) for each in value] if isinstance(value, tuple) else value
