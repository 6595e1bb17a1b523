"""What a record says of where it was made."""

from __future__ import annotations

import subprocess

from dmoe_var.experiment import record


def test_the_commit_is_of_the_package_alone(tmp_path, monkeypatch):
    """And not of a repository in which it is installed; "+" tells of files that differ."""

    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", *author, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    source = tmp_path / ".venv" / "site-packages" / "record.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(record, "__file__", str(source))
    commit = record.git_commit.__wrapped__
    git("init", "-q")
    git("commit", "-qm", "mine", "--allow-empty")
    assert commit() == "unknown"
    git("add", "-f", ".")
    git("commit", "-qm", "ours")
    assert commit() == git("rev-parse", "HEAD")
    source.write_text("changed")
    assert commit() == git("rev-parse", "HEAD") + "+"


def test_a_record_that_is_not_there_is_none(tmp_path, capfd):
    """Whoever looked before may have seen one: another run takes it away when it begins."""
    assert record.whole_record(tmp_path / "result.json", "not done") is None
    assert capfd.readouterr().err == ""
