"""Sample pictures to look at: chosen classes and seeds, dense beside dynamic.

The j-th of `sample.per_class` pictures of class c under seed s is what
`generate(labels=[c], seed=s, start_index=j)` samples, whatever else is sampled beside it. Pictures
stand in the order of classes, then seeds, then j. Legend: N pictures, R picture side.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dmoe_var.arrays import write_npz
from dmoe_var.config.root import Config
from dmoe_var.data.class_names import class_names, slug, title
from dmoe_var.data.images import to_uint8
from dmoe_var.distributed import gathered, is_main, rank, world_size
from dmoe_var.errors import CheckpointError, InputError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import require
from dmoe_var.experiment.stage import Keys, Stage, StageResult
from dmoe_var.figures import sample_grid
from dmoe_var.files import whole_file
from dmoe_var.models.collaborative_var import AnyVAR
from dmoe_var.models.dynamic_var import SHARED_FIELDS, DynamicVAR, rules_of
from dmoe_var.models.int8 import in_precision
from dmoe_var.models.recipe import Recipe
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.selection import Selection, describe
from dmoe_var.moe.tau_schedule import check_configured
from dmoe_var.sampling.draw import SAMPLES_FILE, balanced_labels
from dmoe_var.sampling.sampler import generate
from dmoe_var.stages.parts import loaded, skipping
from dmoe_var.stages.parts.loaded import EXPERTS, Models
from dmoe_var.stages.parts.on_device import check_sampling
from dmoe_var.stages.parts.skipped_means import let_means_stand

MOST_CLASSES = 10  # sampled if `sample.classes` is null
GRID_FILE = "grid.png"


@dataclass(frozen=True)
class Drawer:
    """A model to sample from, and the title of its pictures."""

    model: AnyVAR
    title: str
    selection: Selection = None
    impl: str = "auto"
    recipe: Recipe | None = None
    """How to sample, in place of the configured recipe; None for that."""


@dataclass(frozen=True)
class Pictures:
    """The pictures to sample: every class under every seed, `per_class` times."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    per_class: int
    names: tuple[str, ...] | None
    """Names of all classes, if they are known."""

    @classmethod
    def of(cls, config: Config) -> Pictures:
        sample, num_classes = config.sample, config.var.num_classes
        spread = balanced_labels(min(MOST_CLASSES, num_classes), num_classes).tolist()
        # Config has turned names into indices.
        labels = tuple(int(label) for label in sample.classes or spread)
        names = class_names(config.data, num_classes)
        return cls(labels, sample.seeds, sample.per_class, names)

    @property
    def columns(self) -> int:
        """Pictures per class, which are the columns of the grid."""
        return len(self.seeds) * self.per_class

    @property
    def row_names(self) -> list[str]:
        """Titles of the grid's rows, one per class."""
        return [title(self.names, label) for label in self.labels]

    @property
    def column_names(self) -> list[str]:
        """Titles of the grid's columns; a seed's first column names the seed."""
        rest = [""] * (self.per_class - 1)
        return [name for seed in self.seeds for name in (f"seed {seed}", *rest)]

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        """Label, seed and index of each picture, in order."""
        return list(itertools.product(self.labels, self.seeds, range(self.per_class)))

    @property
    def file_names(self) -> list[str]:
        """File name of each picture, in order: class207_golden_retriever_seed0_1.png."""
        names = self.names or [str(label) for label in range(max(self.labels) + 1)]
        named = {c: "" if names[c] == str(c) else f"_{slug(names[c])}" for c in self.labels}
        return [f"class{c}{named[c]}_seed{seed}_{j}.png" for c, seed, j in self.cells]


def settled(experiment: Experiment) -> tuple[Experiment, str | None]:
    """Decide what `sample.model` null stands for; return a line that says so if it is not both.

    If the experts are not made yet, the dense model samples alone. Raise InputError if what is
    asked for is not there; the error says so if the dense model is.
    """
    sample = experiment.config.sample
    if sample.pretrained is None:
        experiment = _changed(experiment, selection="stored")  # without effect: names no folder
    asked, dense = (
        _changed(experiment, model=sample.model or "both"),
        _changed(experiment, model="dense"),
    )
    reason = _missing(asked)
    if reason is None:
        return asked, None
    if sample.pretrained is not None or _missing(dense) is not None:
        raise reason
    if sample.model is not None:
        raise InputError(f"{reason}, or give sample.model=dense") from reason
    return dense, f"sample: the dense model alone, there is no dynamic one yet: {reason}"


def _missing(experiment: Experiment) -> InputError | None:
    """Find why pictures cannot be sampled yet. Raise CheckpointError for a stage that is broken."""
    try:
        for stage in experiment.needs("sample"):
            require(experiment, stage)
    except InputError as error:
        if isinstance(error, CheckpointError):
            raise
        return error
    return None


def _changed(experiment: Experiment, **fields: str) -> Experiment:
    """Change the `sample` section. In the experiment's own, `model` null becomes both."""
    config, own = experiment.whole, experiment.baseline.sample
    return Experiment(
        replace(config, sample=replace(config.sample, **fields)),  # type: ignore[arg-type]
        replace(experiment.baseline, sample=replace(own, model=own.model or "both")),
    )


def run(experiment: Experiment) -> StageResult:
    """Write grid.png and, in a folder per model, samples.npz and single PNGs if asked for.

    samples.npz: arr_0 uint8 (N, R, R, 3); labels, seeds and start_indices (N,), with which
    `generate` samples each picture again.
    """
    config, folder = experiment.config, experiment.folder("sample")
    pictures = Pictures.of(config)
    vqvae = loaded.vqvae(experiment).to(config.sampling.torch_dtype)
    panels = {}
    about: dict[str, object] = {"grid": GRID_FILE, "seeds": list(pictures.seeds)}
    for name, drawer in _drawers(experiment, vqvae).items():
        images = _draw(experiment, drawer, vqvae, pictures, name)
        panels[drawer.title] = images
        about[name] = drawer.title
        if drawer.recipe is not None:
            about["recipe"] = asdict(drawer.recipe)
        if drawer.model.skipped is not None:
            about["means_of"] = describe(drawer.model.skipped.selection)
        about.setdefault("samples", f"{name}/{SAMPLES_FILE}")
        if is_main():
            _write(images, pictures, folder / name, config.sample.single_pngs)
    if is_main():
        sample_grid.draw(
            panels, pictures.columns, folder / GRID_FILE, pictures.row_names, pictures.column_names
        )
    return StageResult({}, len(pictures.cells), about, pictures.seeds[0], config.sampling.dtype)


def _drawers(experiment: Experiment, vqvae: VQVAE) -> dict[str, Drawer]:
    """Load the models to sample from, by the name of their folder."""
    config, sample = experiment.config, experiment.config.sample
    dtype, stored = config.sampling.torch_dtype, None
    if sample.pretrained is not None:
        stored = _pretrained(sample.pretrained, config).to(experiment.device, dtype)
    dense = loaded.dense(experiment).to(dtype) if stored is None else stored.dense
    by = None if config.drafter.var is None else loaded.drafter(experiment).to(dtype)
    after = "" if by is None else f", {config.drafter.scales} drafted"
    drawers: dict[str, Drawer] = {}
    if "dense" in _models(config):
        drawers["dense"] = Drawer(loaded.drafted(config, dense, by), f"dense VAR{after}")
    if "dynamic" in _models(config):
        dynamic = stored or DynamicVAR(dense, loaded.split(experiment).to(dtype), config.moe.scales)
        own = stored is not None and sample.selection == "stored"
        rules: Selection = dynamic.selection if own else config.selection.rules()
        if stored is None:
            let_means_stand(Models(experiment), experiment, dynamic, vqvae, rules)
        elif not own and config.moe.skipped == "zero":
            dynamic.set_skipped(None)
        recipe = dynamic.recipe if own and dynamic.recipe != Recipe() else None
        how = describe(rules) + ("" if dynamic.skipped is None else " with means")
        model = loaded.drafted(config, dynamic, by)
        title = f"DMoE-VAR, {how}{after}"
        drawers["dynamic"] = Drawer(model, title, rules, config.moe.impl, recipe)
    return {
        name: replace(each, model=in_precision(each.model, config.sampling.int8))
        for name, each in drawers.items()
    }


def _models(config: Config) -> Keys:
    """Name the models to sample from."""
    model = config.sample.model
    return ("dense", "dynamic") if model is None or model == "both" else (model,)


def _pretrained(source: str, config: Config) -> DynamicVAR:
    """Load the stored model. Raise CheckpointError if it is not of the configured shape."""
    model = DynamicVAR.from_pretrained(source)
    for name in SHARED_FIELDS:
        theirs, ours = getattr(model.config, name), getattr(config.var, name)
        if theirs != ours:
            raise CheckpointError(
                f"{source}: {name} is {theirs}, the configuration says var.{name}={ours}"
            )
    if "dynamic" in _models(config) and config.moe.scales != model.replaced_scales:
        raise CheckpointError(
            f"{source}: its second model runs scales {[*model.replaced_scales]}, the configuration "
            f"says moe.scales={[*config.moe.scales]}"
        )
    if "dynamic" in _models(config) and config.moe.skipped == "mean" and model.skipped is None:
        raise CheckpointError(
            f"{source}: moe.skipped=mean, but it holds no means of skipped experts; allowed: zero"
        )
    ours = config.sampling.recipe
    stored = "dynamic" in _models(config) and config.sample.selection == "stored"
    if stored and model.recipe != Recipe():
        if ours not in (Recipe(), model.recipe):
            raise CheckpointError(
                f"{source}: sampling is given ({ours}), but a recipe is stored ({model.recipe}); "
                "allowed: none, or sample.selection=given"
            )
        if model.recipe.skipping.scales and config.drafter.var is not None:
            raise CheckpointError(
                f"{source}: its recipe skips tokens, drafter.var={config.drafter.var} cannot; "
                "allowed: drafter.var=null"
            )
        if model.recipe.heads.scales and config.sampling.int8 != "none":
            raise CheckpointError(
                f"{source}: its recipe leaves out heads, sampling.int8={config.sampling.int8} has "
                "projections without heads; allowed: sampling.int8=none"
            )
    if config.sample.selection == "given" and "dynamic" in _models(config):
        shape, given = model.moe.config, config.selection
        scales = (shape.num_scales, model.moe_scales)
        try:  # not every rule fits the stored model
            check_configured(given, *scales, shape.depth, shape.num_experts)
            rules_of(model, selection=given.rules())
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error
    return model


def _draw(
    experiment: Experiment, drawer: Drawer, vqvae: VQVAE, pictures: Pictures, name: str
) -> np.ndarray:
    """Sample all pictures, uint8 (N, R, R, 3). Each process samples its share and gets them all."""
    sampling = experiment.config.sampling
    starts = range(0, pictures.per_class, sampling.batch_size)
    batches = list(itertools.product(pictures.labels, pictures.seeds, starts))
    ours = range(rank(), len(batches), world_size())
    drawn, graphs = {}, sampling.new_graphs(experiment.device)
    for i in tqdm(ours, name, unit="batch", leave=False, disable=not experiment.progress):
        label, seed, start = batches[i]
        images_B3RR = generate(
            drawer.model,
            vqvae,
            [label] * min(sampling.batch_size, pictures.per_class - start),
            **{**sampling.options, **(drawer.recipe or sampling.recipe).options},
            seed=seed,
            selection=drawer.selection,
            start_index=start,
            impl=drawer.impl,
            graphs=graphs,
        )
        drawn[i] = to_uint8(images_B3RR)
    everything = {i: images for part in gathered(drawn) for i, images in part.items()}
    return np.concatenate([everything[i] for i in range(len(batches))])


def _write(images: np.ndarray, pictures: Pictures, folder: Path, single_pngs: bool) -> None:
    """Write one model's folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    labels, seeds, start_indices = np.array(pictures.cells, dtype=np.int64).T
    keys = {"labels": labels, "seeds": seeds, "start_indices": start_indices}
    write_npz(folder / SAMPLES_FILE, {"arr_0": images, **keys})
    named = zip(images, pictures.file_names, strict=True) if single_pngs else ()
    for image, file_name in named:
        with whole_file(folder / file_name) as temporary:
            Image.fromarray(image).save(temporary, format="PNG")


def reads(config: Config, ours: Config) -> Keys:
    """Declare the keys. `data.kind` names the classes; of a stored model only the shape counts."""
    experts = EXPERTS if "dynamic" in _models(config) else ()
    ours_too = ("sampling", "sample", "vqvae", "base.vqvae", "data.kind")
    common = (*experts, *loaded.drafter_keys(config), *ours_too)
    if ours.sample.pretrained is not None:
        return (*common, *(f"var.{name}" for name in SHARED_FIELDS))
    return (*common, "var", "base.var")


def needs(config: Config) -> Keys:
    """Name the stages. A model that is given needs none, as pictures need no validation."""
    base, sample = config.base, config.sample
    if sample.pretrained is None and "dynamic" in _models(config):
        return (config.expert_stage,)
    if sample.pretrained is None and base.var is None:
        return ("train_var",)
    return ("train_vqvae",) if base.vqvae is None else ()


def refuse(config: Config) -> None:
    """Raise ConfigError for what a model to sample from cannot do."""
    check_sampling(config, "dynamic" in _models(config))
    if "dense" in _models(config):
        skipping.refuse_router(config, f"sample.model={config.sample.model or 'both'}")


STAGE = Stage("sample", run, reads, needs, refuse=refuse)
