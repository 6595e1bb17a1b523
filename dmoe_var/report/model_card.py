"""The model card (README.md) of a saved DynamicVAR: drawn from the model and from records alone."""

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

PAPER = "https://arxiv.org/abs/2510.08629"
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
    sections = [
        f"# {load_as}\n\n{_description(model)}",
        f"## Use\n\n{_usage(load_as, _bases(records, 'vqvae'))}",
        f"## Measured\n\n{_measured(records, model)}",
        *_hyper_parameters(records),
        f"## Origin\n\n{_origin(records, bases, known)}",
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    return str(ModelCard(text))


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


def _description(model: DynamicVAR) -> str:
    config, experts = model.config, model.moe.config.experts
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dense = sum(parameter.numel() for parameter in model.dense.parameters())
    scales = ", ".join(map(str, model.replaced_scales))
    split = "an unsplit ReLU model"
    if experts is not None:
        num_experts = model.moe.config.hidden // experts.expert_size
        split = f"{num_experts} experts of {experts.expert_size} neurons in every FFN"
    lines = [
        "A visual autoregressive image model that computes at its later scales only what each "
        f"token needs ([DMoE-VAR]({PAPER})): the dense VAR runs most scales, a fine-tuned one with "
        "experts the others, over one K/V cache.",
        "",
        f"- depth {config.depth}, width {config.C}, {config.num_classes} classes, token maps of "
        f"{', '.join(map(str, config.patch_nums))}",
        f"- scales {scales} (from 0) run {split}",
        f"- {parameters / 1e6:.2f} M parameters ({dense / 1e6:.2f} M in the dense model), "
        f"{str(next(model.parameters()).dtype).removeprefix('torch.')}",
        f"- what runs where a call names no rule: {_shown_selection(model)}",
    ]
    return "\n".join(lines)


def _shown_selection(model: DynamicVAR) -> str:
    rules = _rules(model)
    if not rules:
        return "every expert"
    return "; ".join(f"scale {si}: {_shown_rule(rule)}" for si, rule in rules.items())


def _rules(model: DynamicVAR) -> dict[int, SelectionRule]:
    return rules_of(model)


def _shown_rule(rule: SelectionRule) -> str:
    values = [f"{field.name} {_shown_value(getattr(rule, field.name))}" for field in fields(rule)]  # type: ignore[arg-type]
    return " ".join([type(rule).__name__, *values])


def _shown_value(value: object) -> str:
    """A field of a rule, whatever it holds: a number, or one a layer."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown_value, value))}]"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if number else str(value)


def _usage(load_as: str, tokenizers: Sequence[str]) -> str:
    named = len(tokenizers) == 1 and tokenizers[0] in MIT_BASES
    known = tokenizers[0] if named else "PATH OF ITS VQ-VAE"
    return "\n".join(
        [
            "```python",
            "from dmoe_var import DynamicVAR, generate, load_vqvae",
            f'model, vqvae = DynamicVAR.from_pretrained("{load_as}"), load_vqvae("{known}")',
            "images = generate(model, vqvae, labels=[0, 1])  # (2, 3, H, W) in [0, 1]",
            "```",
            "",
            "`tau=` in a call is Eq. 3's threshold ratio and overrides the stored rule: 0 runs "
            "every expert, larger values fewer.",
        ]
    )


def _measured(records: Sequence[Record], model: DynamicVAR) -> str:
    points = [point for record in records for point in _points(record)]
    if not points:
        return "Nothing was measured: no record of an evaluation came with this model."
    lines = [
        "| setting | tau | scales | images | seeds | GMAC an image | saved | quality |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        saved = _saved(point, points)
        name = (
            f"**{point.name}** (this model's rule and scales)"
            if _is_stored(point, model)
            else point.name
        )
        cells = [
            name,
            ", ".join(f"{tau:g}" for tau in point.tau) or UNKNOWN,
            ", ".join(map(str, point.scales)) or UNKNOWN,
            str(point.num_images),
            ", ".join(map(str, point.seeds)),
            f"{point.gmac:.4f}",
            UNKNOWN if saved is None else f"{saved:.1%}",
            "; ".join(f"{key} {value}" for key, value in point.quality.items()),
        ]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines += [
        "",
        "One GMAC is 1e9 multiply-adds; guidance's two branches are in, the VQ-VAE decoder is not. "
        "`saved` is against the dense model of the same records. A `±` is the standard deviation "
        "over seeds. FID depends on the number of images and on the network in its name: compare "
        "equal ones only.",
    ]
    return "\n".join(lines)


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
    return measured == list(_rules(model).values())


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


def _hyper_parameters(records: Sequence[Record]) -> list[str]:
    """How the model was made and sampled; of two records that differ the later one's."""
    found = {
        key: value
        for record in records
        for key, value in record.config.items()
        if key.startswith(SETTINGS) and key.rpartition(".")[2] not in HOUSEKEEPING
    }
    if not found:
        return []
    rows = [f"| {_cell(key)} | {_cell(found[key])} |" for key in sorted(found)]
    return ["\n".join(["## Hyper-parameters", "", "| key | value |", "|---|---|", *rows])]


def _origin(records: Sequence[Record], bases: Sequence[str], known: bool) -> str:
    shown = ", ".join(Path(base).name for base in bases) or "not recorded"
    licence = "MIT, as its base model" if known else "not recorded; that of the base model applies"
    lines = [f"- base model: {shown}", f"- licence: {licence}"]
    for record in records:
        lines += [f"- {record.stage}: {key} sha256 `{h}`" for key, h in record.weights.items()]
        hashes = {key: value for key, value in _leaves(record.about) if "sha256" in key}
        lines += [f"- {record.stage}: {key} `{_cell(value)}`" for key, value in hashes.items()]
        versions = ", ".join(f"{name} {version}" for name, version in record.libraries.items())
        lines.append(
            f"- {record.stage}: seed {record.seed}, {record.dtype} on {_cell(record.device)}, "
            f"commit `{record.git_commit}`, {_cell(versions)}, {record.ended}"
        )
    return "\n".join(lines)


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
