"""What a script prints and how it is stopped, in processes of a second that import no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
START = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import _streams as s\n"
SAYS = """
s.open_streams()
import time
from pathlib import Path
for number in range(2000):
    print(number, "x" * 100, flush=True)
    print(number, "y" * 100, file=sys.stderr, flush=True)
Path("done").write_text("done")
"""
WAITS = """
s.open_streams()
import time
try:
    with s.stopped_in_order():
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            print("in order", flush=True)
except (KeyboardInterrupt, s.Terminated) as error:
    number = getattr(error, "number", 2)
    print(s.stopped_by(number), file=sys.stderr)
    sys.exit(128 + number)
"""


def shell(command, code, folder, **variables):
    """Run a line of bash in which $SCRIPT is a Python program, whose status is the line's."""
    program = folder / "program.py"
    program.write_text(START + code)
    line = command.replace("$SCRIPT", f"{sys.executable} {program}")
    environment = {**os.environ, **variables}
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], cwd=folder, capture_output=True,
        text=True, check=False, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "$SCRIPT 2>&1 | head -1",
        "$SCRIPT >&- 2>&-",
        "$SCRIPT >/dev/full 2>/dev/full",
    ],
)
def test_a_script_that_nobody_hears_ends_its_work(tmp_path, command):
    """A pipe whose reader has gone, streams that are closed, a full disk under the log."""
    done = shell(command, SAYS, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") <= 1
    assert (tmp_path / "done").read_text() == "done"


def test_a_closed_stream_is_not_the_next_file(tmp_path):
    code = "s.open_streams()\nwith open('record', 'w'):\n    import os; os.write(1, b'noise')\n"
    assert shell("$SCRIPT >&-", code, tmp_path).returncode == 0
    assert (tmp_path / "record").read_text() == ""


def test_a_table_in_ascii(tmp_path):
    code = "s.open_streams()\nprint('3.1 ± 0.2')\nprint('±', file=sys.stderr)"
    done = shell("$SCRIPT", code, tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3.1 \\xb1 0.2\n", "\\xb1\n")


def start(code, folder, *, ignored=(), **variables):
    program = folder / "program.py"
    program.write_text(START + code)

    def ignore():  # and nothing else that whoever started the tests may have them ignore
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **variables}, preexec_fn=ignore,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_in_order_and_in_one_line(tmp_path, number):
    process = start(WAITS, tmp_path)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=300)
    # A signal may come before "begun" has left the buffer, which then writes it once more.
    assert (process.returncode, stdout.removeprefix("begun\n")) == (128 + number, "in order\n")
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"stopped ({number.name}); the same command goes on")


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(WAITS.replace('print("in order", flush=True)', "time.sleep(60)"), tmp_path)
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=1)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr.count("\n")) == (130, 1)


def test_a_signal_while_modules_are_imported(tmp_path):
    code = (
        "import time\nwith s.stopped_at_once():\n    print('begun', flush=True); time.sleep(60)\n"
    )
    process = start(code, tmp_path)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr.count("\n")) == (130, 1)


@pytest.mark.parametrize(("ignored", "variables"), [((signal.SIGHUP,), {}), ((), {"RANK": "1"})])
def test_signals_that_are_left_alone(tmp_path, ignored, variables):
    """nohup's SIGHUP; and under torchrun, which ends its processes, all but the keyboard's."""
    process = start(WAITS, tmp_path, ignored=ignored, **variables)
    process.send_signal(signal.SIGHUP)
    if ignored:
        process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=300)
    expected = (143, "in order\n") if ignored else (-signal.SIGHUP, "")
    assert (process.returncode, stdout.removeprefix("begun\n")) == expected
