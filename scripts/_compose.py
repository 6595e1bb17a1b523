"""Compose configurations by Hydra, from configs/ and from folders that the command line names."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from _command_line import parser
from hydra import compose, version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmoe_var.config.explain import declared, explained
from dmoe_var.config.parse import known_keys, parse_config
from dmoe_var.config.root import Config
from dmoe_var.errors import ConfigError, InputError, sentence
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.stage import STAGES, find

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENT = re.compile(r"\+*experiment=")
EVERYWHERE = (
    "name", "run_dir", "seed", "device", "dtype", "threads", "deterministic", "wandb", "progress",
    "launcher",
)  # fmt: skip
"""Keys that every script reads."""

ConfigStore.instance().store("declared", declared())  # configs/root.yaml begins with it


@contextmanager
def composing(script: str, arguments: Namespace) -> Iterator[None]:
    """Let Hydra find configurations within the block, in the command line's folders too."""
    version.setbase("1.3")
    path = create_config_search_path(str(CONFIGS))
    if arguments.config_dir is not None:
        folder = f"file://{arguments.config_dir}"
        path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(script, path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def show(script: str, arguments: Namespace) -> bool:
    """Print what an option asks for in place of a run; tell whether there is such an option."""
    hydra, name = GlobalHydra.instance().hydra, arguments.config_name or script
    with _one_line_errors(arguments.overrides):
        if arguments.help:
            hydra.app_help(config_name=name, args_parser=parser(), args=arguments)
            content = hydra.compose_config(name, arguments.overrides, RunMode.RUN, from_shell=False)
            print(_help(script, _plain(content)))
        elif arguments.cfg:
            hydra.show_cfg(
                name, arguments.overrides, arguments.cfg, arguments.package, arguments.resolve
            )
        elif arguments.info:
            hydra.show_info(arguments.info, config_name=name, overrides=arguments.overrides)
    return bool(arguments.help or arguments.cfg or arguments.info)


def _help(script: str, values: Mapping[str, Any]) -> str:
    """Explain the keys that a script's stage reads; the pipeline's are those of all its stages."""
    pipeline = get_args(get_type_hints(Config)["until"])
    stages = (script,) if script in STAGES else pipeline
    # Stages whose model is given read less: here they are told as if it were trained.
    config = parse_config({**values, "base": {"vqvae": None, "var": None}})
    reads = {*EVERYWHERE, *(key for each in stages for key in find(each).reads_of(config, config))}
    text = explained(values, reads | {"until"} if stages == pipeline else reads)
    return f"== Keys ==\nkey=value sets one; --cfg job shows those of other scripts too\n\n{text}"


def own_experiment(overrides: Sequence[str]) -> list[str]:
    """Write `model=NAME` as `experiment=imagenet_NAME` if that exists and none is named.

    Raise ConfigError for a multirun over models of which only some have their own.
    """
    if any(EXPERIMENT.match(override) for override in overrides):
        return list(overrides)
    there = GlobalHydra.instance().config_loader().get_group_options("experiment")
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        own = [f"imagenet_{model}" for model in value.split(",")] if key == "model" else []
        known = [name for name in own if name in there]
        if known and known != own:
            raise ConfigError(
                f"{override}: of these only {', '.join(known)} are experiments; give experiment= "
                "too"
            )
        found.append(f"experiment={','.join(own)}" if known else override)
    return found


def combinations(name: str, overrides: Sequence[str]) -> list[list[str]]:
    """List the overrides of each point; hydra.sweeper.params of a configuration come first."""
    hydra = GlobalHydra.instance().hydra
    with _one_line_errors(overrides):
        content = hydra.compose_config(name, list(overrides), RunMode.MULTIRUN, from_shell=False)
        params = OmegaConf.select(content, "hydra.sweeper.params") or {}
        given = [*(f"{key}={value}" for key, value in params.items()), *overrides]
        parsed = OverridesParser.create(hydra.config_loader).parse_overrides(given)
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(point) for batch in batches for point in batch]


def experiment_of(script: str, name: str, overrides: Sequence[str]) -> Experiment:
    """Compose the configuration, beside that of its experiment alone, which names what differs."""
    config, experiment = _compose(name, overrides)
    alone = [] if experiment is None else [f"experiment={experiment}"]
    return Experiment(config, baseline=_compose(script, alone)[0])


def _compose(name: str, overrides: Sequence[str]) -> tuple[Config, str | None]:
    """Compose a configuration, and name its experiment."""
    with _one_line_errors(overrides):
        content = compose(name, list(overrides), return_hydra_config=True)
        experiment = content.hydra.runtime.choices.get("experiment")
        plain = _plain(content, throw_on_missing=True)
    if "experiment" in plain:
        raise ConfigError(
            f"experiment={experiment}: its file must begin with the line # @package _global_, and "
            "with nothing before it (such as a byte order mark)"
        )
    return parse_config(plain), experiment


def _plain(content: DictConfig, throw_on_missing: bool = False) -> dict[str, Any]:
    """Turn what was composed, without Hydra's own settings, into plain values."""
    ours = OmegaConf.masked_copy(content, [key for key in content if key != "hydra"])
    return OmegaConf.to_container(ours, resolve=True, throw_on_missing=throw_on_missing)


@contextmanager
def _one_line_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Raise as ConfigError what Hydra and the files it reads may raise."""
    try:
        yield
    except InputError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error, overrides)) from error
    except OSError as error:
        raise ConfigError(sentence(error)) from error
    except (yaml.YAMLError, ValueError) as error:
        given = " ".join(overrides)
        raise ConfigError(f"a configuration file cannot be read ({given}): {error}") from error


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Write Hydra's message with the key, its value and what is allowed."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {text}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        # Of a section that is given as a whole the error behind it names the key
        within = re.search(r"full_key: (\S+)", str(error.__cause__))
        *path, last = (within or unknown)[1].split(".")
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
