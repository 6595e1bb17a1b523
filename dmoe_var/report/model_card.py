"""Write the model card (README.md) of a saved DynamicVAR: model_card.md, filled from the model and
from records alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dmoe_var import markdown
from dmoe_var.checkpoints.hub import PUBLISHED, REPOSITORY
from dmoe_var.checkpoints.load import PREFIXES, model_names
from dmoe_var.checkpoints.pretrained import upload, write_model
from dmoe_var.config.root import flatten
from dmoe_var.errors import DataError
from dmoe_var.experiment.points import MEASURES, joined
from dmoe_var.experiment.record import Record
from dmoe_var.experiment.view import says
from dmoe_var.models.dynamic_var import DynamicVAR, rules_of
from dmoe_var.models.head_skipping import HeadSkipping
from dmoe_var.models.recipe import Recipe
from dmoe_var.models.token_skipping import TokenSkipping
from dmoe_var.moe.selection import SelectionRule, Threshold, describe, recorded_selection
from dmoe_var.moe.tau_schedule import by_scale
from dmoe_var.sampling.sampler import SamplingConfig

TEMPLATE = Path(__file__).with_suffix(".md")
TAGS = ["dmoe-var", "var", "mixture-of-experts", "class-conditional-image-generation"]
MIT_BASES = frozenset(name for kind in PREFIXES for name in model_names(kind))
"""Base models whose licence is known: the published VAR's and those that this package carries."""
MAKING = ("conversion.", "sparsify.", "split.", "train_router.", "tune_experts.")
SETTINGS = (*MAKING, "sampling.")
HOUSEKEEPING = ("log_every", "validate_every", "checkpoint_every")
SAME = ("sampling.", "base.", "evaluate.", "fidelity.")
"""Beginnings of the keys in which the evaluations of one setting agree, except the seed. With
experts, they also agree in how these were made, and in `moe` and `selection`."""
CHECKED = ("depth", "width", "num_heads", "num_classes", "patch_nums")
"""Fields of VARConfig that tell a record of another model."""
UNKNOWN = "-"

Records = Sequence[Record | str | Path]


@dataclass(frozen=True)
class Measured:
    """One measured setting. row: its numbers over the seeds, as `points.joined` has them; for a
    sweep also what it saves."""

    name: str
    rules: tuple[SelectionRule, ...]
    """One rule for all scales, one per sparse scale, or one per scale; none for the dense model."""
    scales: tuple[int, ...]
    num_images: int
    seeds: tuple[int, ...]
    cfg: float | Sequence[float]
    fidelity: str
    row: Mapping[str, Any]
    recipe: Recipe | None = None
    """None if no model can be stored so."""
    skipped: str = "zero"
    """What stood for experts that did not run (`moe.skipped`)."""


def save_pretrained(model: DynamicVAR, folder: str | Path, records: Records = ()) -> None:
    """Write a model's folder, whole or not at all. Of several processes, only one may call this.

    records: what was measured of it, as records or paths to result.json files. They fill the model
    card, which without any says that nothing was measured. Raise DataError for a record that is
    broken or of another model. See `checkpoints.pretrained.write_model` for the folder.
    """
    write_model(model, folder, model_card(model, Path(folder).resolve().name, records))


def push_to_hub(
    model: DynamicVAR,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Add a DynamicVAR",
    records: Records = (),
) -> str:
    """Upload what `save_pretrained` writes; see `checkpoints.pretrained.upload`."""
    card = model_card(model, repo_id, records)
    return upload(model, repo_id, card, private, token, commit_message)


def model_card(model: DynamicVAR, load_as: str, given: Records = ()) -> str:
    """Write Markdown with YAML front matter. load_as: what `from_pretrained` takes, in the example.

    Raise DataError if a record cannot be read, lacks what is shown or tells of another model shape.
    """
    records = [one if isinstance(one, Record) else Record.read(Path(one)) for one in given]
    for record in records:
        _check_record(record, model)
    bases = _bases(records, "var")
    known = bool(bases) and all(base in MIT_BASES for base in bases)
    data = ModelCardData(
        library_name="dmoe-var",
        license="mit" if known else None,
        base_model=REPOSITORY if set(bases) & set(PUBLISHED) else None,
        tags=TAGS,
    )
    tokenizers = _bases(records, "vqvae")
    named = len(tokenizers) == 1 and tokenizers[0] in MIT_BASES
    settings = _hyper_parameters(records)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        load_as=load_as,
        config=model.moe.config,
        experts=model.moe.config.experts,
        scales=model.replaced_scales,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dense_parameters=sum(parameter.numel() for parameter in model.dense.parameters()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        selection=_shown_selection(model),
        tokenizer=tokenizers[0] if named else "PATH OF ITS VQ-VAE",
        options=_options(model, settings),
        measured=_table(_settings(records), model),
        settings=markdown.table(["key", "value"], sorted(settings.items())) if settings else "",
        bases=[Path(base).name for base in bases],
        origins=[(record, _hashes(record)) for record in records],
    )
    return str(card)


def _options(model: DynamicVAR, settings: Mapping[str, Any]) -> str:
    """Write what a call of `generate` adds to sample as the records did: the stored recipe, and
    top_k and top_p that are not its defaults."""
    recipe = "" if model.recipe == Recipe() else ", **model.recipe.options"
    defaults = SamplingConfig()
    keys = ("top_k", "top_p")
    given = {key: settings.get(f"sampling.{key}", getattr(defaults, key)) for key in keys}
    others = (f", {k}={v}" for k, v in given.items() if v != getattr(defaults, k))
    return recipe + "".join(others)


def _check_record(record: Record, model: DynamicVAR) -> None:
    for name in CHECKED:
        ours = getattr(model.config, name)
        ours = list(ours) if isinstance(ours, tuple) else ours
        theirs = record.config.get(f"var.{name}", ours)
        # A width or number of heads that is not given follows from the depth.
        if theirs is not None and theirs != ours:
            raise DataError(
                f"record of {record.stage}: var.{name} is {theirs}, this model has {ours}"
            )


def _shown_selection(model: DynamicVAR) -> str:
    shown = []
    for si, rule in rules_of(model).items():
        values = [f"{f.name} {_shown_value(getattr(rule, f.name))}" for f in fields(rule)]  # type: ignore[arg-type]
        shown.append(" ".join([f"scale {si}: {type(rule).__name__}", *values]))
    if model.skipped is not None:
        shown.append(f"skipped experts add their means under {describe(model.skipped.selection)}")
    return "; ".join(shown) or "every expert"


def _shown_value(value: object) -> str:
    """Show a field of a rule, whatever it holds: a number, or one per layer."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown_value, value))}]"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if number else str(value)


def _table(found: Sequence[Measured], model: DynamicVAR) -> str:
    """Tabulate what was measured; the table is empty if nothing was."""
    rows = []
    for each in found:
        saved = _saved(each, found)
        stored = f"**{each.name}** (this model's rule and scales)"
        rows.append([
            stored if _is_stored(each, model) else each.name,
            [f"{rule.tau:g}" for rule in each.rules if isinstance(rule, Threshold)] or UNKNOWN,
            each.scales or UNKNOWN,
            each.num_images,
            each.seeds,
            f"{each.row['flops_gmac']:.4f}",
            UNKNOWN if saved is None else f"{saved:.1%}",
            _quality(each),
        ])  # fmt: skip
    heads = ["setting", "tau", "scales", "images", "seeds", "GMAC an image", "saved", "quality"]
    return markdown.table(heads, rows) if rows else ""


def _quality(measured: Measured) -> str:
    """Write FID, with its spread over several seeds, and what else was measured."""
    row = measured.row
    spread = f" ± {row['fid_std']:.2g}" if len(measured.seeds) > 1 else ""
    others = [f"{key} {row[key]:.4g}" for key in row if key.startswith(MEASURES)]
    return "; ".join([f"{measured.fidelity} {row['fid_mean']:.4g}{spread}", *others])


def _saved(measured: Measured, found: Sequence[Measured]) -> float | None:
    """Find the share of the dense model's FLOPs, under the same guidance, that a setting saves."""
    if "flops_saved" in measured.row:
        return float(measured.row["flops_saved"])
    same = ("dense", measured.cfg)
    dense = {each.row["flops_gmac"] for each in found if (each.name, each.cfg) == same}
    return 1 - measured.row["flops_gmac"] / dense.pop() if len(dense) == 1 else None


def _is_stored(measured: Measured, model: DynamicVAR) -> bool:
    """Tell whether a setting has the scales and rules that the model is stored with."""
    skipped = "zero" if model.skipped is None else "mean"
    ours = (model.moe_scales, skipped, model.recipe)
    if (measured.scales, measured.skipped, measured.recipe) != ours or not measured.rules:
        return False
    rules = by_scale("tau", measured.rules, model.config.num_scales, measured.scales)
    return rules == list(rules_of(model).values())


def _settings(records: Sequence[Record]) -> list[Measured]:
    """Collect what evaluations and sweeps measured. Evaluations that differ only in their seed are
    one setting."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        dense = record.config.get("evaluate.model") == "dense"
        same = SAME if dense else (*SAME, *MAKING, "moe.", "selection.")
        keys = {
            k: v for k, v in record.config.items() if k.startswith(same) and says(k, record.config)
        }
        keys |= {"evaluate.seed": None, "num_samples": record.num_samples}
        if record.stage == "evaluate":
            groups.setdefault(json.dumps(keys, sort_keys=True), []).append(record)
    found: list[Measured] = []
    try:
        stage = "evaluate"
        found += [_evaluated(group) for group in groups.values()]
        stage = "sweep"
        found += [each for r in records if r.stage == "sweep" for each in _swept(r)]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"record of {stage}: {reason}") from error
    return found


def _evaluated(records: Sequence[Record]) -> Measured:
    """Join the evaluations of one setting."""
    first, config = records[0], records[0].config
    dense = config["evaluate.model"] == "dense"
    selection = recorded_selection(config)
    rule, found = selection.kind, selection.rules()
    rules = tuple(found) if isinstance(found, list) else (found,)
    name = "dense" if dense else rule.wording or rule.name
    recipe, in_8_bits = _recipe(first), config.get("sampling.int8", "none") != "none"
    sharpened = config.get("sampling.temperature") is not None
    told = "".join(
        words
        for words, said in (
            (", tokens skipped", recipe.skipping.scales),
            (", heads skipped", recipe.heads.scales),
            (", in 8 bits", in_8_bits),
            (", at another temperature", sharpened),
        )
        if said
    )
    return Measured(
        name=name + told,
        rules=() if dense else rules,
        scales=() if dense else tuple(config["moe.scales"]),
        num_images=first.num_samples,
        seeds=tuple(record.seed for record in records),
        cfg=config["sampling.cfg"],
        recipe=None if in_8_bits or sharpened else recipe,
        fidelity=first.about["fidelity"],
        row=joined(records),
        skipped=config.get("moe.skipped", "zero"),
    )


def _swept(record: Record) -> Iterator[Measured]:
    """Yield the dense model and the operating point of a sweep."""
    names = {"dense": "dense", "chosen": "operating point"}
    for row in record.about["settings"]:
        if row["group"] in names:
            yield Measured(
                name=names[row["group"]],
                rules=tuple(map(Threshold, row["tau"])),
                scales=tuple(row["scales"]),
                num_images=record.num_samples,
                seeds=tuple(record.about["seeds"]),
                cfg=record.config["sampling.cfg"],
                recipe=_recipe(record),
                fidelity=record.about["fidelity"],
                row=row,
                skipped=record.config.get("moe.skipped", "zero"),
            )


def _recipe(record: Record) -> Recipe:
    """Read how images were sampled."""
    config = record.config

    def section(name: str) -> dict[str, Any]:
        own = f"sampling.{name}."
        return {k.removeprefix(own): v for k, v in config.items() if k.startswith(own)}

    skipping, heads = TokenSkipping(**section("skipping")), HeadSkipping(**section("heads"))
    share_mask = config.get("sampling.share_mask", False)
    return Recipe(config["sampling.cfg"], share_mask, skipping, heads)


def _hyper_parameters(records: Sequence[Record]) -> dict[str, Any]:
    """Collect how the model was made and sampled. If two records differ, the later one counts;
    those of a dense model tell nothing of how experts were made."""
    return {
        key: value
        for record in records
        if record.stage != "evaluate" or record.config["evaluate.model"] != "dense"
        for key, value in record.config.items()
        if key.startswith(SETTINGS)
        and says(key, record.config)
        and key.rpartition(".")[2] not in HOUSEKEEPING
        and (record.is_tuned or not key.startswith("tune_experts."))
    }


def _hashes(record: Record) -> dict[str, Any]:
    """Collect the hashes of the files that the record was made with."""
    about = {key: value for key, value in flatten(record.about) if "sha256" in key}
    return {f"{key} sha256": value for key, value in record.weights.items()} | about


def _bases(records: Sequence[Record], kind: str) -> list[str]:
    """List what the records say the base VAR or VQ-VAE was: names, or paths."""
    keys = (f"base.{kind}", *(("train_var.start",) if kind == "var" else ()))
    found = [record.config.get(key) for record in records for key in keys]
    return sorted({str(base) for base in found if base is not None})
