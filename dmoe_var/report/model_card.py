"""The model card (README.md) of a saved DynamicVAR: model_card.md, filled from the model and from
records alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dmoe_var.checkpoints.hub import PUBLISHED, REPOSITORY
from dmoe_var.checkpoints.pretrained import upload, write_model
from dmoe_var.errors import DataError
from dmoe_var.experiment.record import Record
from dmoe_var.models.dynamic_var import DynamicVAR, rules_of
from dmoe_var.moe.selection import SelectionRule, Threshold, recorded_selection
from dmoe_var.moe.tau_schedule import by_scale

TEMPLATE = Path(__file__).with_suffix(".md")
TAGS = ["dmoe-var", "var", "mixture-of-experts", "class-conditional-image-generation"]
MIT_BASES = (*PUBLISHED, "digits")
"""Base models whose licence is known: the published VAR's and the one that this package carries."""
SETTINGS = ("conversion.", "sparsify.", "split.", "train_router.", "sampling.")
HOUSEKEEPING = ("log_every", "validate_every", "checkpoint_every")
QUALITY = ("fid", "inception_score", "precision", "recall", "label_agreement")
"""Beginnings of the names of the metrics that the card shows beside FLOPs."""
CHECKED = ("depth", "width", "num_heads", "num_classes", "patch_nums")
"""Fields of VARConfig by which a record of another model is found out."""
UNKNOWN = "-"

Records = Sequence[Record | str | Path]


@dataclass(frozen=True)
class Point:
    """One measured setting. tau: empty for the dense model and rules without one."""

    name: str
    rules: tuple[SelectionRule, ...]
    """One for all scales, one a sparse scale, or one a scale; none for the dense model."""
    tau: tuple[float, ...]
    scales: tuple[int, ...]
    num_images: int
    seeds: tuple[int, ...]
    gmac: float
    saved: float | None
    cfg: float
    quality: Mapping[str, str]


def save_pretrained(model: DynamicVAR, folder: str | Path, records: Records = ()) -> None:
    """Write a model's folder whole or not at all; in a run of several processes, from one of them.

    records: what was measured of it, as records or paths to result.json files; they fill the model
    card, which without any says that nothing was measured. See `checkpoints.pretrained.write_model`
    for the folder; DataError for a record that is broken or of another model.
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
    """Markdown with YAML front matter. load_as: what `from_pretrained` takes, in the example.

    DataError where a record cannot be read, lacks what is shown or is of a model of another shape.
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
    points = [point for record in records for point in _points(record)]
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
        measured=[[*map(_cell, _measured(point, points, model))] for point in points],
        settings=[[*map(_cell, item)] for item in sorted(_hyper_parameters(records).items())],
        bases=[Path(base).name for base in bases],
        origins=[(record, _hashes(record)) for record in records],
    )
    return str(card)


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
    shown = [f"scale {si}: {_shown_rule(rule)}" for si, rule in rules_of(model).items()]
    return "; ".join(shown) or "every expert"


def _shown_rule(rule: SelectionRule) -> str:
    values = [f"{field.name} {_shown_value(getattr(rule, field.name))}" for field in fields(rule)]  # type: ignore[arg-type]
    return " ".join([type(rule).__name__, *values])


def _shown_value(value: object) -> str:
    """A field of a rule, whatever it holds: a number, or one a layer."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown_value, value))}]"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if number else str(value)


def _measured(point: Point, points: Sequence[Point], model: DynamicVAR) -> list[str]:
    """A point's cells of the table."""
    mine, saved = _is_stored(point, model), _saved(point, points)
    return [
        f"**{point.name}** (this model's rule and scales)" if mine else point.name,
        ", ".join(f"{tau:g}" for tau in point.tau) or UNKNOWN,
        ", ".join(map(str, point.scales)) or UNKNOWN,
        str(point.num_images),
        ", ".join(map(str, point.seeds)),
        f"{point.gmac:.4f}",
        UNKNOWN if saved is None else f"{saved:.1%}",
        "; ".join(f"{key} {value}" for key, value in point.quality.items()),
    ]


def _saved(point: Point, points: Sequence[Point]) -> float | None:
    """Share of the dense model's FLOPs, under the same guidance, that a point saves."""
    if point.saved is not None:
        return point.saved
    dense = {other.gmac for other in points if (other.name, other.cfg) == ("dense", point.cfg)}
    return 1 - point.gmac / dense.pop() if len(dense) == 1 else None


def _is_stored(point: Point, model: DynamicVAR) -> bool:
    """Whether a point was measured with the scales and rules that the model is stored with."""
    if not point.rules or point.scales != model.moe_scales:
        return False
    measured = by_scale("tau", point.rules, model.config.num_scales, point.scales)
    return measured == list(rules_of(model).values())


def _points(record: Record) -> Iterator[Point]:
    """The measured settings of an evaluation or a sweep; none of another stage."""
    try:
        if record.stage == "evaluate":
            yield _evaluated(record)
        elif record.stage == "sweep":
            yield from _swept(record)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"record of {record.stage}: {reason}") from error


def _evaluated(record: Record) -> Point:
    config, metrics = record.config, record.metrics
    dense = config["evaluate.model"] == "dense"
    selection = recorded_selection(config)
    rule, found = selection.kind, selection.rules()
    rules = tuple(found) if isinstance(found, list) else (found,)
    quality = {k: f"{v:.4g}" for k, v in metrics.items() if k.startswith(QUALITY)}
    return Point(
        name="dense" if dense else rule.wording or rule.name,
        rules=() if dense else rules,
        tau=() if dense else tuple(each.tau for each in rules if isinstance(each, Threshold)),
        scales=() if dense else tuple(config["moe.scales"]),
        num_images=record.num_samples,
        seeds=(record.seed,),
        gmac=metrics["flops_gmac"],
        saved=None,
        cfg=config["sampling.cfg"],
        quality=quality,
    )


def _swept(record: Record) -> Iterator[Point]:
    """The dense model and the operating point of a sweep."""
    fid, seeds = record.about["fidelity"], tuple(record.about["seeds"])
    for row in record.about["settings"]:
        if row["group"] not in ("dense", "chosen"):
            continue
        spread = f" ± {row['fid_std']:.2g}" if len(seeds) > 1 else ""
        quality = {fid: f"{row['fid_mean']:.4g}{spread}"}
        if "label_agreement" in row:
            quality["label_agreement"] = f"{row['label_agreement']:.4g}"
        yield Point(
            name="dense" if row["group"] == "dense" else "operating point",
            rules=tuple(map(Threshold, row["tau"])),
            tau=tuple(row["tau"]),
            scales=tuple(row["scales"]),
            num_images=record.num_samples,
            seeds=seeds,
            gmac=row["flops_gmac"],
            saved=row["flops_saved"],
            cfg=record.config["sampling.cfg"],
            quality=quality,
        )


def _hyper_parameters(records: Sequence[Record]) -> dict[str, Any]:
    """How the model was made and sampled; of two records that differ the later one's."""
    return {
        key: value
        for record in records
        for key, value in record.config.items()
        if key.startswith(SETTINGS) and key.rpartition(".")[2] not in HOUSEKEEPING
    }


def _hashes(record: Record) -> dict[str, Any]:
    """What says which files the record was made with."""
    about = {key: value for key, value in _leaves(record.about) if "sha256" in key}
    return {f"{key} sha256": value for key, value in record.weights.items()} | about


def _bases(records: Sequence[Record], kind: str) -> list[str]:
    """What the records say the base VAR or VQ-VAE was: names, or paths."""
    found = [record.config.get(f"base.{kind}") for record in records]
    return sorted({str(base) for base in found if base is not None})


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cell(value: object) -> str:
    """Text that leaves a Markdown table whole."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
