"""What a record says of where it was made."""

from __future__ import annotations

import subprocess

from dmoe_var.experiment import record


def test_a_package_inside_another_repository_does_not_take_its_commit(tmp_path, monkeypatch):
    assert record.git_commit.__wrapped__() != "unknown"
    installed = tmp_path / ".venv" / "site-packages" / "record.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    (tmp_path / "mine.txt").write_text("somebody's own project")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "mine.txt"], [*author, "commit", "-qm", "mine"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(record, "__file__", str(installed))
    assert record.git_commit.__wrapped__() == "unknown"


def test_a_record_that_is_not_there_is_none(tmp_path, capfd):
    """Whoever looked before may have seen one: another run takes it away when it begins."""
    assert record.whole_record(tmp_path / "result.json", "not done") is None
    assert capfd.readouterr().err == ""
