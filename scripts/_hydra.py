"""What every script shares: Hydra composes, one conversion, one line for wrong input.

A script is `main(run)` with run(work: Work). Every point of a multirun is checked before the
first one runs.
"""

from __future__ import annotations

import re
import sys
import warnings
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

from dmoe_var.config import known_keys, parse_config  # noqa: E402
from dmoe_var.errors import ConfigError, InputError, TrainingDiverged  # noqa: E402
from dmoe_var.stages.graph import prepare, run_stage  # noqa: E402
from dmoe_var.stages.work import Work  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WRONG_INPUT, FAILED = 2, 1


def main(run: Callable[[Work], None]) -> None:
    """Run a script's function for each composed configuration."""
    script = Path(sys.argv[0]).stem
    _check_all(script)

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


def stage_main(stage: str) -> None:
    """A script that runs one stage."""

    def run(work: Work) -> None:
        record = run_stage(work, stage)
        shown = {name: value for name, value in record.metrics.items() if "scale" not in name}
        numbers = "  ".join(f"{name}={value:.4g}" for name, value in shown.items())
        print(f"{stage}: {work.folder(stage)}  {numbers}")

    main(run)


def _stop(error: Exception, status: int) -> NoReturn:
    print(" ".join(str(error).split()), file=sys.stderr)
    sys.exit(status)


def _check_all(script: str) -> None:
    """Compose and convert every point of the command line; exit with one line at the first error.

    Hydra itself would print several lines, exit with 1, and find an error in a multirun's last
    point only after running the others.
    """
    arguments = get_args_parser().parse_args()
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info:
        return
    try:
        for overrides in _points(arguments.overrides, arguments.multirun):
            _ = _work(script, _compose(script, overrides), overrides).device
    except InputError as error:
        _stop(error, WRONG_INPUT)


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
    experiment = [o for o in overrides if re.match(r"\+*experiment=", o)]
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
