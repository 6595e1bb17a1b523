"""What every script shares: Hydra composes, one conversion, one line for wrong input.

A script is `main(run)` with run(work: Work). Every point of a multirun is checked before the
first one runs; with `launcher=slurm` each is a job. Under torchrun only the main process prints.

`model=NAME` without `experiment=` runs that model's own experiment, imagenet_NAME, where
configs/experiment holds it: `model=d16` is `experiment=imagenet_d16`, which is made for it.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# torch-fidelity scripts functions at import, which torch 2.13 and later announce to be going.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit.*")

from dmoe_var import launcher  # noqa: E402
from dmoe_var.config import Config, known_keys, parse_config  # noqa: E402
from dmoe_var.errors import ConfigError, InputError, TrainingDiverged  # noqa: E402
from dmoe_var.metrics.record import Record  # noqa: E402
from dmoe_var.stages.graph import prepare, run_stage  # noqa: E402
from dmoe_var.stages.work import Work  # noqa: E402
from dmoe_var.training import distributed  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENT = re.compile(r"\+*experiment=")
LAUNCHER = re.compile(r"\+*launcher[.=]")
WRONG_INPUT, FAILED = 2, 1
GRACE = 10
"""Seconds that a process under torchrun leaves the main one to say what is wrong."""


def main(
    run: Callable[[Work], None], in_full: Callable[[list[str]], list[str]] | None = None
) -> None:
    """Run a script's function for each composed configuration.

    in_full: writes out what a script's command line has short forms for.
    """
    script = Path(sys.argv[0]).stem
    arguments = _command_line(in_full or list)
    configs = _check_all(script, arguments)
    if configs and configs[0].launcher.cluster is not None:
        _launch(configs[0], arguments.overrides)
        return

    def task(content: DictConfig) -> None:
        try:
            work = _work(script, content, HydraConfig.get().overrides.task)
            prepare(work)
            run(work)
        except InputError as error:
            _stop(error, WRONG_INPUT)
        except OSError as error:  # a folder that cannot be written, a full disk
            _stop(InputError(f"{error.filename}: {error.strerror}"), WRONG_INPUT)
        except TrainingDiverged as error:
            _stop(error, FAILED)

    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=script)(task)()
    distributed.stop()


def stage_main(stage: str) -> None:
    """A script that runs one stage."""
    main(lambda work: report(work, stage, run_stage(work, stage)))


def report(work: Work, stage: str, record: Record) -> None:
    """Say where a stage's results are, and its numbers."""
    shown = {name: value for name, value in record.metrics.items() if "scale" not in name}
    numbers = "  ".join(f"{name}={value:.4g}" for name, value in shown.items())
    say(f"{stage}: {work.folder(stage)}  {numbers}".rstrip())


def say(text: str) -> None:
    """Print, in the main process."""
    if distributed.is_main():
        print(text, flush=True)


def _stop(error: Exception, status: int) -> NoReturn:
    """Exit with one line, which is the main process's where it fails too.

    The others wait: torchrun ends all processes as soon as one has failed, and would end the main
    one before it has spoken.
    """
    if not distributed.launched_as_main():
        time.sleep(GRACE)
    print(" ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(status)


def _command_line(in_full: Callable[[list[str]], list[str]]) -> Namespace:
    """The arguments as Hydra parses them, overrides written out; sys.argv becomes what they are.

    Ends the process for what is neither an option of Hydra's nor key=value.
    """
    parser = get_args_parser()

    def stop(message: str) -> NoReturn:
        _stop(ConfigError(message), WRONG_INPUT)

    parser.error = stop  # type: ignore[method-assign]
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        stop(f"{unknown[0]}: unknown option; settings are key=value, options --help, --cfg job, -m")
    for override in arguments.overrides:
        if "=" not in override and not override.startswith("~"):
            stop(f"{override}: no setting; settings are key=value, options --help, --cfg job, -m")
    options = list(sys.argv[1:])
    for override in arguments.overrides:
        options.remove(override)
    try:
        arguments.overrides = _own_experiment(in_full(arguments.overrides))
    except InputError as error:
        _stop(error, WRONG_INPUT)
    sys.argv[1:] = [*arguments.overrides, *options]
    return arguments


def _own_experiment(overrides: list[str]) -> list[str]:
    """`model=NAME` as `experiment=imagenet_NAME` where there is one and none is named.

    ConfigError for a multirun over models of which only some have their own.
    """
    if any(EXPERIMENT.match(override) for override in overrides):
        return overrides
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        models = value.split(",") if key == "model" else []
        own = [f"imagenet_{model}" for model in models]
        exist = [(CONFIGS / "experiment" / f"{name}.yaml").is_file() for name in own]
        if any(exist) and not all(exist):
            with_own = ", ".join(m for m, there in zip(models, exist, strict=True) if there)
            raise ConfigError(
                f"{override}: of these only {with_own} have an experiment of their own; give "
                "experiment= too"
            )
        found.append(f"experiment={','.join(own)}" if any(exist) else override)
    return found


def _launch(config: Config, overrides: Sequence[str]) -> None:
    """Run each point as a job, say what each said, and end as the first that failed did."""
    points = [
        [override for override in point if not LAUNCHER.match(override)]
        for point in _points(overrides, multirun=True)
    ]
    folder = Path(config.run_dir) / "multirun"
    say(f"{len(points)} jobs ({config.launcher.cluster}), logs under {folder}")
    try:
        finished = launcher.run_jobs(config.launcher, Path(sys.argv[0]), points, folder)
    except InputError as error:
        _stop(error, WRONG_INPUT)
    for each in finished:
        print(each.output, end="", flush=True)
    failed = [each for each in finished if each.status]
    for each in failed[1:]:
        print(each.error, file=sys.stderr)
    if failed:
        _stop(InputError(failed[0].error), failed[0].status)


def _check_all(script: str, arguments: Namespace) -> list[Config]:
    """Compose and convert every point of the command line; exit with one line at the first error.

    Hydra itself would print several lines, exit with 1, and find an error in a multirun's last
    point only after running the others.
    """
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info:
        return []
    configs = []
    try:
        for overrides in _points(arguments.overrides, arguments.multirun):
            work = _work(script, _compose(script, overrides), overrides)
            _check_launcher(work.config, configs, arguments.multirun)
            configs.append(work.config)
            if work.config.launcher.cluster is None:  # a job's machine may have another
                _ = work.device
    except InputError as error:
        _stop(error, WRONG_INPUT)
    return configs


def _check_launcher(config: Config, others: Sequence[Config], multirun: bool) -> None:
    """ConfigError where jobs cannot be sent."""
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


def _points(overrides: Sequence[str], multirun: bool) -> list[list[str]]:
    """The overrides of each point."""
    if not multirun:
        return [list(overrides)]
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(_one_line(error, overrides)) from error
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(point) for batch in batches for point in batch]


def _configs(script: str) -> Any:
    return hydra.initialize_config_dir(str(CONFIGS), job_name=script, version_base="1.3")


def _compose(script: str, overrides: Sequence[str]) -> DictConfig:
    running = GlobalHydra.instance().is_initialized()
    try:
        with nullcontext() if running else _configs(script):
            return hydra.compose(config_name=script, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error, overrides)) from error


def _work(script: str, content: DictConfig, overrides: Sequence[str]) -> Work:
    """The configuration, beside that of the experiment alone, which names what differs."""
    experiment = [override for override in overrides if EXPERIMENT.match(override)]
    baseline = _compose(script, experiment)
    return Work(config=parse_config(_plain(content)), baseline=parse_config(_plain(baseline)))


def _plain(content: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(content, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message with the key, its value and what is allowed."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {text}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        *path, last = unknown[1].split(".")
        given = next((o for o in overrides if o.lstrip("+~").startswith(unknown[1])), unknown[1])
        return f"{given}: unknown key; {known_keys(tuple(path), last)}"
    missing = re.search(r"Could not find '([^']+)'", text)
    options = re.search(
        r"Available options in '[^']+':\s*(.*?)\s*(Config search path|$)", text, re.S
    )
    if missing and options:
        group, _, name = missing[1].rpartition("/")
        return f"{group}={name}: no such option; allowed: {', '.join(options[1].split())}"
    return text
