"""Read the command line: options, and settings as Hydra's grammar wants them.

The parser is our own: Hydra's does not start under Python 3.14. What a shell passes is written out
before Hydra reads it, so that a path may hold whatever a path can hold.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, Sweep
from hydra.errors import HydraException

from dmoe_var.config.parse import is_declared, is_text, is_users_own
from dmoe_var.config.recipe import read_recipe
from dmoe_var.errors import ConfigError

USE = "settings are key=value, options --help, --cfg job, -m"
SHOWN = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
BRACKETS = dict(zip("[{(", "]})", strict=True))


def parser() -> ArgumentParser:
    """Build a parser for those of Hydra's options that a script of ours can follow."""
    options = ArgumentParser(add_help=False)
    add = options.add_argument
    add("overrides", nargs="*", help="settings, key=value; dots for what lies within a section")
    add("--help", "-h", action="store_true", help="this text")
    add("--cfg", "-c", choices=SHOWN, help="show the configuration and do nothing")
    add("--resolve", action="store_true", help="with --cfg: interpolations resolved")
    add("--package", "-p", help="with --cfg: this section alone")
    add("--info", "-i", nargs="?", const="all", choices=INFO, help="show where it comes from")
    add("--multirun", "-m", action="store_true", help="a run for each combination of a,b,c")
    add("--config-dir", "-cd", help="a folder of your own, beside configs/: FOLDER/experiment/NAME")
    add("--config-name", "-cn", help="another root than the script's own")
    return options


def is_utf8(text: str) -> bool:
    """Say whether an argument came in UTF-8: other bytes come as halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def read(in_full: Callable[[list[str]], list[str]]) -> Namespace:
    """Read this process's arguments; raise ConfigError for what is no option and no key=value.

    in_full: writes out the short forms of a script's settings.
    """
    for given in sys.argv[1:]:
        if not is_utf8(given):
            raise ConfigError(f"{given!r}: not UTF-8; allowed: text in UTF-8")
        if "\r" in given:
            raise ConfigError(
                f"{given!r}: holds a carriage return: the file that it comes from has the line "
                "ends of Windows (CRLF); convert that file, for example with dos2unix"
            )
    options = parser()
    options.error = _refuse  # type: ignore[method-assign]
    arguments = options.parse_intermixed_args()
    for override in arguments.overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override}: no setting; {USE}")
        if override.startswith(("hydra.", "hydra/")):
            raise ConfigError(
                f"{override}: Hydra's own settings are not read here. Results go to run_dir, "
                "`launcher` says where the points of a multirun run, and configurations of your "
                "own lie in the folder of -cd"
            )
    if arguments.config_dir is not None:
        folder = Path(arguments.config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir={arguments.config_dir}: no such folder")
        arguments.config_dir = str(folder)
    written = in_full(_with_recipe(arguments.overrides))
    arguments.overrides = [written_out(each, arguments.multirun) for each in written]
    return arguments


def _with_recipe(overrides: list[str]) -> list[str]:
    """Put the settings of recipe=FILE in its place, before all others, which stand above them."""
    given = [each for each in overrides if each.startswith("recipe=")]
    if len(given) > 1:
        raise ConfigError(f"{' '.join(given)}: one recipe at most")
    rest = [each for each in overrides if each not in given]
    for each in given:
        keys = read_recipe(Path(each.partition("=")[2]).expanduser())
        rest = [f"{key}={json.dumps(value)}" for key, value in keys.items()] + rest
    return rest


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; {USE}")


def options_of(arguments: Namespace) -> list[str]:
    """Return the options that a job needs to compose the same configuration."""
    given = {"--config-dir": arguments.config_dir, "--config-name": arguments.config_name}
    return [f"{option}={value}" for option, value in given.items() if value is not None]


def written_out(override: str, multirun: bool) -> str:
    """Write a setting as Hydra reads it: quoted if its grammar would refuse a text or change it.

    Lists, sections, interpolations, null and, in a multirun, several values stay what they are.
    Raise ConfigError for several values without a multirun.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if not equals or key.startswith("~"):
        return override
    if is_users_own(name) or (key != name and is_declared(name)):  # may be new, and may be there
        key = f"++{name}"
    text = is_text(name)
    if text and _is_there(value):
        return f"{key}={_quoted(value, text)}"
    found = _parsed(value)
    if isinstance(found, Sweep) and not multirun:
        raise ConfigError(
            f"{override}: several values are for a multirun, -m; a list is written [a,b]"
        )
    if multirun and (isinstance(found, Sweep) or (found is None and "," in value)):
        parts = _split(value)
        several = len(parts) > 1
        return f"{key}={','.join(_quoted(each, text) for each in parts) if several else value}"
    return f"{key}={_quoted(value, text)}"


def _is_there(value: str) -> bool:
    try:
        return value != "" and Path(value).expanduser().exists()
    except (OSError, RuntimeError):  # too long; a user without a home
        return False


def _parsed(value: str) -> Any:
    """Parse a value as Hydra does; return None for what it refuses."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")._value or ""
    except HydraException:
        return None


def _quoted(value: str, text: bool) -> str:
    """Quote a value if Hydra refuses it, or takes a text for something else."""
    found = _parsed(value)
    kept = found is not None and (
        not text or found == value or isinstance(found, QuotedString) or "${" in value
    )
    if kept or value == "" or value.lower() == "null":
        return value
    if not text and value.startswith("["):
        inner = _split(value[1:-1]) if value.endswith("]") else []
        elements = [_quoted(each, text) for each in inner]
        return f"[{','.join(elements)}]" if elements and elements != inner else value
    if not text and value.startswith("{"):
        return value
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def _split(text: str) -> Sequence[str]:
    """Split at the commas outside of brackets and quotes; a quote within a word is a letter."""
    parts, open_, quote = [""], [], ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        elif letter in BRACKETS:
            open_.append(BRACKETS[letter])
        elif open_ and letter == open_[-1]:
            open_.pop()
        elif letter == "," and not open_:
            parts.append("")
            continue
        parts[-1] += letter
    return parts
