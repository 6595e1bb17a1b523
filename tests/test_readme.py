"""The commands of the README are typed by people, in bash and in zsh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
MEANT_BY_A_SHELL = re.compile(r"[\[\]*?(){}<>^~#!]")


def commands() -> list[str]:
    """The lines of code blocks that name no language, those that end in a backslash joined."""
    blocks = re.findall(r"^```\n(.*?)^```$", README.read_text(encoding="utf-8"), re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(python3?|torchrun|\.venv)\b", line)]


@pytest.mark.parametrize("command", commands())
def test_a_shell_takes_every_command_as_it_stands(command: str) -> None:
    # zsh ends with "no matches found" for a bracket, and takes a comment for arguments.
    assert MEANT_BY_A_SHELL.findall(QUOTED.sub("", command)) == []


def test_commands_are_found() -> None:
    assert len(commands()) > 15
