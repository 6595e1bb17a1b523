"""What a record says of where it was made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import dmoe_var
from dmoe_var.experiment.record import whole_record


def test_a_package_inside_another_repository_does_not_take_its_commit(tmp_path: Path) -> None:
    site = tmp_path / ".venv" / "site-packages"
    shutil.copytree(
        Path(dmoe_var.__file__).parent,
        site / "dmoe_var",
        ignore=shutil.ignore_patterns("packaged", "__pycache__"),
    )
    (tmp_path / "mine.txt").write_text("somebody's own project")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "mine.txt"], [*author, "commit", "-qm", "mine"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    code = "from dmoe_var.experiment import record; print(record.__file__, record.git_commit())"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=site, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said == [str(site / "dmoe_var" / "experiment" / "record.py"), "unknown"]


def test_a_record_that_is_not_there_is_none(tmp_path, capfd):
    """Whoever looked before may have seen one: another run takes it away when it begins."""
    assert whole_record(tmp_path / "result.json", "not done") is None
    assert capfd.readouterr().err == ""
