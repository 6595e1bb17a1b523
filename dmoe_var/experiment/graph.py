"""Join the stages in a graph: what is done is skipped, what was interrupted goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from zipfile import is_zipfile

import torch
import yaml

from dmoe_var.checkpoints.safetensors_io import CONFIG_FILE, read_fingerprint
from dmoe_var.checkpoints.tensor_files import remove_tensors
from dmoe_var.devices import device_name
from dmoe_var.distributed import barrier, from_main, is_main, start, world_size
from dmoe_var.errors import CheckpointError, DataError, InputError
from dmoe_var.experiment.contents import held
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.record import (
    RESULT_FILE,
    OtherSchema,
    Record,
    git_commit,
    library_versions,
    now,
    whole_record,
)
from dmoe_var.experiment.stage import StageResult, find
from dmoe_var.files import alone, read_json, write_text
from dmoe_var.moe.experts import RAN
from dmoe_var.threads import limit_threads
from dmoe_var.training.state import STATE_FILE

StageFunction = Callable[[Experiment], StageResult]


def record_if_done(experiment: Experiment, stage: str) -> Record | None:
    """Read the stage's record if it is done with this configuration, else return None.

    A record that a crash left empty or broken is none, nor is one whose samples are gone or cut
    short. Raise CheckpointError if the stage is done but its checkpoint is cut short or gone,
    DataError for a record of another program version.
    """
    folder = experiment.folder(stage)
    try:
        record = whole_record(folder / RESULT_FILE, f"{stage} is not done")
    except OtherSchema as error:
        raise DataError(f"{error}; remove {folder} to make it again") from error
    if record is None or record.fingerprint != experiment.fingerprint(stage, record.weights):
        return None
    samples = record.about.get("samples")  # samples.npz, or a folder of PNGs
    if samples and not ((folder / samples).is_dir() or is_zipfile(folder / samples)):
        return None
    if record.about.get("checkpoint"):
        try:
            found = read_fingerprint(folder / "checkpoint")
            read_json(folder / "checkpoint" / CONFIG_FILE, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove {folder} to make it again") from error
        if found != record.fingerprint:
            raise CheckpointError(
                f"{folder / 'checkpoint'}: belongs to another configuration (fingerprint "
                f"{found or 'none'}, its record has {record.fingerprint}); remove {folder} to make "
                "it again"
            )
    return record


def require(experiment: Experiment, stage: str) -> Record:
    """Read the record of a stage that another builds on. Raise InputError if it is not done."""
    record = record_if_done(experiment, stage)
    if record is not None:
        return record
    path = experiment.folder(stage) / RESULT_FILE
    if not path.exists():
        raise InputError(
            f"{stage} is not done in {path.parent}; run scripts/{stage}.py or scripts/pipeline.py "
            "with the same options first"
        )
    again = f"run scripts/{stage}.py or scripts/pipeline.py again"
    try:
        found = Record.read(path)
    except DataError as error:
        raise DataError(f"{error}; {again}") from error
    differs = experiment.differing(stage, found)
    raise InputError(
        f"{path.parent}: made with another configuration "
        f"({'; '.join(differs) or 'other files behind the same names'}); {again}"
    )


def prepare(experiment: Experiment) -> None:
    """Set up the whole process (threads, determinism, TF32) and join torchrun's others."""
    config, device = experiment.whole, experiment.device
    if config.threads is None:
        limit_threads()
    else:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start(device)


@held()
def run_stage(experiment: Experiment, stage: str, function: StageFunction | None = None) -> Record:
    """Run a stage unless it is done; return its record either way.

    Raise InputError if what it builds on is not done; `run_through` does that first. Wait for
    another run in the same stage's folder. `function` stands in for the `run` of the stage's
    module (a sweep shares loaded models between its points).
    """
    experiment.check(stage)
    done = _done(experiment, stage)
    if done is not None:
        return done
    _find_weights(experiment, stage)
    _require_upstream(experiment, stage)
    folder = experiment.folder(stage)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    with alone(folder) if is_main() else nullcontext():
        done = _done(experiment, stage)  # by another run, meanwhile
        return _run(experiment, stage, folder, function) if done is None else done


def _find_weights(experiment: Experiment, stage: str) -> None:
    """Raise CheckpointError for given files that are not there, before any work."""
    if is_main():
        experiment.weights(stage)


def _done(experiment: Experiment, stage: str) -> Record | None:
    """Read, in every process, the record of a stage that need not run; remove what is left over."""
    skippable = is_main() and not find(stage).is_never_done(experiment.whole)
    done = from_main(record_if_done(experiment, stage) if skippable else None)
    if done is not None and is_main():
        remove_tensors(experiment.folder(stage) / STATE_FILE)
    return done


def _run(
    experiment: Experiment, stage: str, folder: Path, function: StageFunction | None
) -> Record:
    if is_main():
        (folder / RESULT_FILE).unlink(missing_ok=True)
        plain = json.loads(json.dumps(asdict(experiment.whole)))  # tuples as lists
        write_text(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    barrier()
    started, ran_before = now(), RAN.copy()
    result = (function or find(stage).run)(experiment.read_by(stage))
    if ran := RAN - ran_before:
        result = replace(result, about={**result.about, "experts_ran_by": sorted(ran)})
        RAN.subtract(ran)  # told once: a sweep's points have their own records
    record = from_main(_record(experiment, stage, result, started) if is_main() else None)
    assert record is not None
    if is_main():
        record.write(folder)
        remove_tensors(folder / STATE_FILE)
    barrier()
    return record


def _require_upstream(experiment: Experiment, stage: str) -> None:
    """Raise InputError if a model that the stage builds on is neither given nor made."""
    for upstream in experiment.needs(stage):
        if experiment.is_given(upstream):
            _require_upstream(experiment, upstream)
        else:
            require(experiment, upstream)


def _record(experiment: Experiment, stage: str, result: StageResult, started: str) -> Record:
    return Record(
        stage=stage,
        variant=experiment.variant(stage),
        fingerprint=experiment.fingerprint(stage),
        metrics=result.metrics,
        config=dict(experiment.whole.leaves),
        seed=experiment.whole.seed if result.seed is None else result.seed,
        num_samples=result.num_samples,
        dtype=result.dtype or experiment.whole.dtype,
        started=started,
        ended=now(),
        device=device_name(experiment.device),
        processes=world_size(),
        threads=torch.get_num_threads(),
        git_commit=git_commit(),
        libraries=library_versions(),
        weights={**experiment.weights(stage), **experiment.contents(stage)},
        weights_dtype=experiment.weights_dtype(stage),
        about=result.about,
    )


@held()
def run_through(experiment: Experiment, last: str, on_stage: Callable[[str, bool], None]) -> Record:
    """Run a stage and all that it builds on, in order.

    `on_stage(name, done)` is called before each; done says whether it will be skipped. Models that
    stages are given are looked at before the first one runs.
    """
    experiment.check(last)
    stages = order(experiment, last)
    _find_weights(experiment, last)
    for stage in stages:
        look = find(stage).look
        if look is not None and record_if_done(experiment, stage) is None:
            look(experiment.read_by(stage))
    for stage in stages:
        on_stage(stage, from_main(is_main() and record_if_done(experiment, stage) is not None))
        record = run_stage(experiment, stage)
    return record


def order(experiment: Experiment, last: str) -> list[str]:
    """List a stage's upstream stages, then itself."""
    stages: list[str] = []
    for upstream in experiment.needs(last):
        stages += [name for name in order(experiment, upstream) if name not in stages]
    return [*stages, last]
