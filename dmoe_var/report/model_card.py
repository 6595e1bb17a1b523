"""The model card (README.md) of a saved DynamicVAR: drawn from the model and from records alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dmoe_var import markdown
from dmoe_var.checkpoints.hub import PUBLISHED, REPOSITORY
from dmoe_var.checkpoints.pretrained import upload, write_model
from dmoe_var.errors import DataError
from dmoe_var.experiment.points import MEASURES, joined
from dmoe_var.experiment.record import Record
from dmoe_var.markdown import cell
from dmoe_var.models.dynamic_var import DynamicVAR, rules_of
from dmoe_var.moe.selection import SelectionRule, Threshold

PAPER = "https://arxiv.org/abs/2510.08629"
TAGS = ["dmoe-var", "var", "mixture-of-experts", "class-conditional-image-generation"]
MIT_BASES = (*PUBLISHED, "digits")
"""Base models whose licence is known: the published VAR's and the one that this package carries."""
SETTINGS = ("conversion.", "sparsify.", "split.", "train_router.", "sampling.")
HOUSEKEEPING = ("log_every", "validate_every", "checkpoint_every")
SAME = (*SETTINGS, "base.", "evaluate.", "fidelity.")
"""Beginnings of the keys in which the evaluations of one setting agree, but for the seed; with
experts also in `moe` and `selection`."""
CHECKED = ("depth", "width", "num_heads", "num_classes", "patch_nums")
"""Fields of VARConfig by which a record of another model is found out."""
UNKNOWN = "-"

Records = Sequence[Record | str | Path]


@dataclass(frozen=True)
class Measured:
    """One measured setting. tau: empty for the dense model and rules without one. row: its numbers
    over the seeds, as `points.joined` has them; of a sweep also what it saves."""

    name: str
    tau: tuple[float, ...]
    scales: tuple[int, ...]
    num_images: int
    seeds: tuple[int, ...]
    cfg: float
    fidelity: str
    row: Mapping[str, Any]


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
    found = _settings(records)
    if not found:
        return "Nothing was measured: no record of an evaluation came with this model."
    heads = ["setting", "tau", "scales", "images", "seeds", "GMAC an image", "saved", "quality"]
    rows = []
    for each in found:
        saved = _saved(each, found)
        stored = f"**{each.name}** (this model's rule and scales)"
        rows.append([
            stored if _is_stored(each, model) else each.name,
            [f"{tau:g}" for tau in each.tau] or UNKNOWN,
            each.scales or UNKNOWN,
            each.num_images,
            each.seeds,
            f"{each.row['flops_gmac']:.4f}",
            UNKNOWN if saved is None else f"{saved:.1%}",
            _quality(each),
        ])  # fmt: skip
    return (
        f"{markdown.table(heads, rows)}\n\n"
        "One GMAC is 1e9 multiply-adds; guidance's two branches are in, the VQ-VAE decoder is not. "
        "`saved` is against the dense model of the same records. A `±` is the standard deviation "
        "over seeds. FID depends on the number of images and on the network in its name: compare "
        "equal ones only."
    )


def _quality(measured: Measured) -> str:
    """FID, with its spread over several seeds, and what else was measured."""
    row = measured.row
    spread = f" ± {row['fid_std']:.2g}" if len(measured.seeds) > 1 else ""
    others = [f"{key} {row[key]:.4g}" for key in row if key.startswith(MEASURES)]
    return "; ".join([f"{measured.fidelity} {row['fid_mean']:.4g}{spread}", *others])


def _saved(measured: Measured, found: Sequence[Measured]) -> float | None:
    """Share of the dense model's FLOPs, under the same guidance, that a setting saves."""
    if "flops_saved" in measured.row:
        return float(measured.row["flops_saved"])
    same = ("dense", measured.cfg)
    dense = {each.row["flops_gmac"] for each in found if (each.name, each.cfg) == same}
    return 1 - measured.row["flops_gmac"] / dense.pop() if len(dense) == 1 else None


def _is_stored(measured: Measured, model: DynamicVAR) -> bool:
    """Whether a setting has the scales and thresholds that the model is stored with."""
    rules = list(_rules(model).values())
    tau = tuple(rule.tau for rule in rules if type(rule) is Threshold)
    taus = measured.tau * len(rules) if len(measured.tau) == 1 else measured.tau
    return (
        bool(tau)
        and len(tau) == len(rules)
        and measured.name in ("threshold", "operating point")
        and (taus, measured.scales) == (tau, model.moe_scales)
    )


def _settings(records: Sequence[Record]) -> list[Measured]:
    """What evaluations and sweeps measured. Evaluations that differ in their seed alone are one
    setting."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        dense = record.config.get("evaluate.model") == "dense"
        same = SAME if dense else (*SAME, "moe.", "selection.")
        keys = {k: v for k, v in record.config.items() if k.startswith(same)}
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
    """The evaluations of one setting."""
    first, config = records[0], records[0].config
    dense = config["evaluate.model"] == "dense"
    rule = "dense" if dense else config["selection.rule"]
    by_layer = rule == "threshold" and bool(config.get("selection.layer_tau"))
    has_tau = rule in ("threshold", "oracle") and not by_layer
    return Measured(
        name=f"{rule}, a tau a layer" if by_layer else rule,
        tau=tuple(config["selection.tau"]) if has_tau else (),
        scales=() if dense else tuple(config["moe.scales"]),
        num_images=first.num_samples,
        seeds=tuple(record.seed for record in records),
        cfg=config["sampling.cfg"],
        fidelity=first.about["fidelity"],
        row=joined(records),
    )


def _swept(record: Record) -> Iterator[Measured]:
    """The dense model and the operating point of a sweep."""
    names = {"dense": "dense", "chosen": "operating point"}
    for row in record.about["settings"]:
        if row["group"] in names:
            yield Measured(
                name=names[row["group"]],
                tau=tuple(row["tau"]),
                scales=tuple(row["scales"]),
                num_images=record.num_samples,
                seeds=tuple(record.about["seeds"]),
                cfg=record.config["sampling.cfg"],
                fidelity=record.about["fidelity"],
                row=row,
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
    rows = [(key, found[key]) for key in sorted(found)]
    return [f"## Hyper-parameters\n\n{markdown.table(['key', 'value'], rows)}"]


def _origin(records: Sequence[Record], bases: Sequence[str], known: bool) -> str:
    shown = ", ".join(Path(base).name for base in bases) or "not recorded"
    licence = "MIT, as its base model" if known else "not recorded; that of the base model applies"
    lines = [f"- base model: {shown}", f"- licence: {licence}"]
    for record in records:
        lines += [f"- {record.stage}: {key} sha256 `{h}`" for key, h in record.weights.items()]
        hashes = {key: value for key, value in _leaves(record.about) if "sha256" in key}
        lines += [f"- {record.stage}: {key} `{cell(value)}`" for key, value in hashes.items()]
        versions = ", ".join(f"{name} {version}" for name, version in record.libraries.items())
        lines.append(
            f"- {record.stage}: seed {record.seed}, {record.dtype} on {cell(record.device)}, "
            f"commit `{record.git_commit}`, {cell(versions)}, {record.ended}"
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
