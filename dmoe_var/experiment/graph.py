"""Join the stages in a graph: what is done is skipped, what was interrupted goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from dmoe_var.checkpoints.safetensors_io import read_fingerprint
from dmoe_var.devices import device_name
from dmoe_var.distributed import barrier, from_main, is_main, start, world_size
from dmoe_var.errors import CheckpointError, DataError, InputError
from dmoe_var.experiment.contents import held
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
from dmoe_var.experiment.work import Work
from dmoe_var.files import alone, write_text
from dmoe_var.moe.experts import RAN
from dmoe_var.threads import limit_threads
from dmoe_var.training.state import STATE_FILE

StageFunction = Callable[[Work], StageResult]


def record_if_done(work: Work, stage: str) -> Record | None:
    """Read the stage's record if it is done with this configuration, else return None.

    A record that a crash left empty or broken is none. Raise CheckpointError if the stage is done
    but its checkpoint is cut short or gone, DataError for a record of another program version.
    """
    folder = work.folder(stage)
    try:
        record = whole_record(folder / RESULT_FILE, f"{stage} is not done")
    except OtherSchema as error:
        raise DataError(f"{error}; remove {folder} to make it again") from error
    if record is None or record.fingerprint != work.fingerprint(stage, record.weights):
        return None
    samples = record.about.get("samples")
    if samples and not (folder / samples).exists():
        return None
    if record.about.get("checkpoint"):
        try:
            found = read_fingerprint(folder / "checkpoint")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove {folder} to make it again") from error
        if found != record.fingerprint:
            raise CheckpointError(
                f"{folder / 'checkpoint'}: belongs to another configuration (fingerprint "
                f"{found or 'none'}, its record has {record.fingerprint}); remove {folder} to make "
                "it again"
            )
    return record


def require(work: Work, stage: str) -> Record:
    """Read the record of a stage that another builds on. Raise InputError if it is not done."""
    record = record_if_done(work, stage)
    if record is not None:
        return record
    path = work.folder(stage) / RESULT_FILE
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
    differs = work.differing(stage, found)
    raise InputError(
        f"{path.parent}: made with another configuration "
        f"({'; '.join(differs) or 'other files behind the same names'}); {again}"
    )


def prepare(work: Work) -> None:
    """Set up the whole process (threads, determinism, TF32) and join torchrun's others."""
    config, device = work.whole, work.device
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
def run_stage(work: Work, stage: str, function: StageFunction | None = None) -> Record:
    """Run a stage unless it is done; return its record either way.

    Raise InputError if what it builds on is not done; `run_through` does that first. Wait for
    another run in the same stage's folder. `function` stands in for the `run` of the stage's
    module (a sweep shares loaded models between its points).
    """
    work.check(stage)
    done = _done(work, stage)
    if done is not None:
        return done
    _require_upstream(work, stage)
    folder = work.folder(stage)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    with alone(folder) if is_main() else nullcontext():
        done = _done(work, stage)  # by another run, meanwhile
        return _run(work, stage, folder, function) if done is None else done


def _done(work: Work, stage: str) -> Record | None:
    """Read, in every process, the record of a stage that need not run; remove what is left over."""
    skippable = is_main() and not find(stage).is_never_done(work.whole)
    done = from_main(record_if_done(work, stage) if skippable else None)
    if done is not None and is_main():
        (work.folder(stage) / STATE_FILE).unlink(missing_ok=True)
    return done


def _run(work: Work, stage: str, folder: Path, function: StageFunction | None) -> Record:
    if is_main():
        (folder / RESULT_FILE).unlink(missing_ok=True)
        plain = json.loads(json.dumps(asdict(work.whole)))  # tuples as lists
        write_text(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    barrier()
    started, ran_before = now(), RAN.copy()
    result = (function or find(stage).run)(work.read_by(stage))
    if ran := RAN - ran_before:
        result = replace(result, about={**result.about, "experts_ran_by": sorted(ran)})
        RAN.subtract(ran)  # told once: a sweep's points have their own records
    record = from_main(_record(work, stage, result, started) if is_main() else None)
    assert record is not None
    if is_main():
        record.write(folder)
        (folder / STATE_FILE).unlink(missing_ok=True)
    barrier()
    return record


def _require_upstream(work: Work, stage: str) -> None:
    """Raise InputError if a model that the stage builds on is neither given nor made."""
    for upstream in work.needs(stage):
        if work.is_given(upstream):
            _require_upstream(work, upstream)
        else:
            require(work, upstream)


def _record(work: Work, stage: str, result: StageResult, started: str) -> Record:
    return Record(
        stage=stage,
        variant=work.variant(stage),
        fingerprint=work.fingerprint(stage),
        metrics=result.metrics,
        config=dict(work.whole.leaves),
        seed=work.whole.seed if result.seed is None else result.seed,
        num_samples=result.num_samples,
        dtype=result.dtype or work.whole.dtype,
        started=started,
        ended=now(),
        device=device_name(work.device),
        processes=world_size(),
        threads=torch.get_num_threads(),
        git_commit=git_commit(),
        libraries=library_versions(),
        weights={**work.weights(stage), **work.contents(stage)},
        weights_dtype=work.weights_dtype(stage),
        about=result.about,
    )


@held()
def run_through(work: Work, last: str, on_stage: Callable[[str, bool], None]) -> Record:
    """Run a stage and all that it builds on, in order.

    `on_stage(name, done)` is called before each; done says whether it will be skipped.
    """
    work.check(last)
    for stage in order(work, last):
        on_stage(stage, from_main(is_main() and record_if_done(work, stage) is not None))
        record = run_stage(work, stage)
    return record


def order(work: Work, last: str) -> list[str]:
    """List a stage's upstream stages, then itself."""
    stages: list[str] = []
    for upstream in work.needs(last):
        stages += [name for name in order(work, upstream) if name not in stages]
    return [*stages, last]
