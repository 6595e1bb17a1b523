"""Commands of the READMEs are typed by people, in bash and in zsh; their links lead to files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = (ROOT / "README.md", ROOT / "notebooks" / "records" / "README.md")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
MEANT_BY_A_SHELL = re.compile(r"[\[\]*?(){}<>^~#!]")


def commands() -> list[str]:
    """The lines of code blocks that name no language, those that end in a backslash joined."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in READMES)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    shell = [block for language, block in blocks if not language]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(python3?|torchrun|\.venv)\b", line)]


@pytest.mark.parametrize("command", commands())
def test_a_shell_takes_every_command_as_it_stands(command: str) -> None:
    # zsh ends with "no matches found" for a bracket, and takes a comment for arguments.
    assert MEANT_BY_A_SHELL.findall(QUOTED.sub("", command)) == []


def test_commands_are_found() -> None:
    assert len(commands()) > 15


@pytest.mark.parametrize("readme", READMES, ids=["README", "records"])
def test_links_lead_to_files(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", readme.read_text(encoding="utf-8"))
    files = [link for link in links if not link.startswith("http")]
    assert files
    assert [link for link in files if not (readme.parent / link).exists()] == []
