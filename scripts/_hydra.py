"""Run a script: Hydra composes, values are converted once, wrong input gives one line.

A script is `main(run)` with run(experiment: Experiment). Every point of a multirun is composed and
checked before the first one runs: a wrong key or value ends all of them before any work. What shows
only once a point runs (a file that is missing, a loss that diverges) ends that point alone; its
line is printed, the others go on, and the script ends with the first failure's status. With
`launcher=slurm` each point is a job. Under torchrun only the main process prints.

`model=NAME` without `experiment=` runs that model's own experiment, imagenet_NAME, if one is found:
`model=d16` is `experiment=imagenet_d16`, which is made for it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from _streams import Terminated, open_streams, stopped_at_once, stopped_by, stopped_in_order

# A notebook's backend, which its shell hands down, may not exist here; figures need none.
os.environ["MPLBACKEND"] = "Agg"
# torch-fidelity scripts functions at import, which torch 2.13 and later announce to be going.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit.*")

with stopped_at_once():
    from _command_line import options_of, read
    from _compose import combinations, composing, experiment_of, own_experiment, show

    from dmoe_var import distributed, launcher
    from dmoe_var.config.root import Config
    from dmoe_var.errors import ConfigError, InputError, TrainingDiverged, sentence
    from dmoe_var.experiment.experiment import Experiment
    from dmoe_var.experiment.graph import prepare, run_stage
    from dmoe_var.experiment.record import Record
    from dmoe_var.experiment.stage import STAGES
    from dmoe_var.training.tracking import Tracking

LAUNCHER = re.compile(r"\+*launcher[.=]")
WRONG_INPUT, FAILED = 2, 1
GRACE = 60
"""Seconds that a process under torchrun leaves the main one to say what is wrong."""


@dataclass(frozen=True)
class Point:
    """What one run of a script is given."""

    overrides: Sequence[str]
    experiment: Experiment


def main(
    run: Callable[[Experiment], None],
    in_full: Callable[[list[str]], list[str]] = list,
    checked_as: Callable[[Experiment], Experiment] = lambda experiment: experiment,
) -> None:
    """Run a script's function for each composed configuration.

    in_full: writes out the short forms of a script's settings. checked_as: gives the experiment
    that the script's stage must be able to run.
    """
    open_streams()
    try:
        with stopped_in_order():
            status = _run(run, in_full, checked_as)
    except (KeyboardInterrupt, Terminated) as error:
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        if distributed.launched_as_main():
            print(stopped_by(number), file=sys.stderr, flush=True)
        sys.exit(128 + number)
    if status:
        sys.exit(status)
    distributed.stop()


def _run(
    run: Callable[[Experiment], None],
    in_full: Callable[[list[str]], list[str]],
    checked_as: Callable[[Experiment], Experiment],
) -> int:
    """Run the script and return its exit status."""
    script = Path(sys.argv[0]).stem
    try:
        arguments = read(in_full)
        with composing(script, arguments):
            arguments.overrides = own_experiment(arguments.overrides)
            if show(script, arguments):
                return 0
            points = _points(script, arguments, checked_as)
    except InputError as error:
        _stop(error, WRONG_INPUT)
    if points[0].experiment.config.launcher.cluster is not None:
        return _launch(points, options_of(arguments))
    statuses = [_run_point(run, point, arguments.multirun) for point in points]
    return next((status for status in statuses if status), 0)


def _run_point(run: Callable[[Experiment], None], point: Point, multirun: bool) -> int:
    """Run one point and return its exit status, once what is wrong has been printed.

    Processes that torchrun started stay in step: there the first failure ends them all.
    """
    alone = not multirun or distributed.launched_processes() > 1
    try:
        prepare(point.experiment)
        run(point.experiment)
        return 0
    except (InputError, OSError) as error:
        failure, status = error, WRONG_INPUT
    except TrainingDiverged as error:
        failure, status = error, FAILED
    except MemoryError as error:  # of Python and numpy
        failure, status = RuntimeError(f"not enough memory: {error}"), FAILED
    except Exception:  # a fault of ours, which is no reason to leave out the other points
        if alone:
            raise
        traceback.print_exc()
        failure, status = RuntimeError("failed, see above"), FAILED
    if alone:
        _stop(failure, status)
    print(f"{' '.join(point.overrides)}: {_line(failure)}", file=sys.stderr, flush=True)
    return status


def stage_main(stage: str) -> None:
    """Run one stage as a script."""
    main(lambda experiment: report(experiment, stage, run_stage(experiment, stage)))


def report(experiment: Experiment, stage: str, record: Record) -> None:
    """Say where a stage's results are, and its numbers."""
    shown = {name: value for name, value in record.metrics.items() if "scale" not in name}
    numbers = "  ".join(f"{name}={value:.4g}" for name, value in shown.items())
    say(f"{stage}: {experiment.folder(stage)}  {numbers}".rstrip())


def say(text: str) -> None:
    """Print, in the main process."""
    if distributed.is_main():
        print(text, flush=True)


def _stop(error: Exception, status: int) -> NoReturn:
    """Exit with one line, the main process's if it fails too.

    The others wait: torchrun ends all processes as soon as one has failed, and would end the main
    one before it has spoken.
    """
    if not distributed.launched_as_main():
        time.sleep(GRACE)
    print(_line(error), file=sys.stderr, flush=True)
    sys.exit(status)


def _line(error: Exception) -> str:
    return " ".join((sentence(error) if isinstance(error, OSError) else str(error)).split())


def _launch(points: Sequence[Point], options: Sequence[str]) -> int:
    """Run each point as a job, print what each said and return the first failure's status."""
    config = points[0].experiment.config
    commands = [
        [*(each for each in point.overrides if not LAUNCHER.match(each)), *options]
        for point in points
    ]
    folder = Path(config.run_dir) / "multirun"
    say(f"{len(points)} jobs ({config.launcher.cluster}), logs under {folder}")
    try:
        finished = launcher.run_jobs(config.launcher, Path(sys.argv[0]), commands, folder)
    except (InputError, OSError) as error:
        _stop(error, WRONG_INPUT)
    for each in finished:
        print(each.output, end="", flush=True)
    for each in finished:
        if each.status:
            print(each.error, file=sys.stderr, flush=True)
    return next((each.status for each in finished if each.status), 0)


def _points(
    script: str, arguments: Namespace, checked_as: Callable[[Experiment], Experiment]
) -> list[Point]:
    """Compose and convert every point of the command line; raise ConfigError for the first fault.

    Hydra itself would print several lines, exit with 1, and find an error in a multirun's last
    point only after running the others.
    """
    name = arguments.config_name or script
    overrides = arguments.overrides
    points: list[Point] = []
    for each in combinations(name, overrides) if arguments.multirun else [overrides]:
        experiment = experiment_of(script, name, each)
        _check_launcher(
            experiment.config, [point.experiment.config for point in points], arguments.multirun
        )
        Tracking(experiment.config.wandb).check()
        if script in STAGES:
            checked_as(experiment).check(script)
        if experiment.config.launcher.cluster is None:  # a job's machine may have another
            _ = experiment.device
        points.append(Point(each, experiment))
    if not points:
        raise ConfigError(f"{' '.join(overrides)}: not one point")
    return points


def _check_launcher(config: Config, others: Sequence[Config], multirun: bool) -> None:
    """Raise ConfigError if jobs cannot be sent."""
    launcher.check(config.launcher)
    cluster = config.launcher.cluster
    if any(other.launcher != config.launcher for other in others):
        raise ConfigError("launcher: the points of a multirun must have one and the same")
    if cluster is not None and not multirun:
        raise ConfigError(f"launcher.cluster={cluster}: jobs are for multiruns; give -m too")
    if cluster is not None and distributed.launched_processes() > 1:
        raise ConfigError(
            f"launcher.cluster={cluster}: start it without torchrun, launcher.gpus starts it in "
            "each job"
        )
