"""Let a script print and be stopped, whatever listens and whoever stops it.

Results are in records: a pipe that nobody reads, a terminal that is gone or a log's full disk ends
no work. Ctrl-C, SIGTERM (a cluster takes the machine back) and SIGHUP end it in good order: whole
files are left alone, one line is printed, and the status is 128 + the signal's number.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP; SIGINT stays the KeyboardInterrupt that libraries know."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


class _Pipe(io.FileIO):
    """The file of a stream, which becomes /dev/null once it cannot be written."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def open_streams() -> None:
    """Put standard output and error on files that never fail; open those that are closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would be taken for the stream
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        encoding = "utf-8" if before is None else before.encoding
        file = io.BufferedWriter(_Pipe(number, "w", closefd=False))
        text = io.TextIOWrapper(file, encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, text)


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let a signal within the block end the process at once: nothing has been begun."""
    with _handled(_at_once):
        yield


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """Let a signal within the block raise KeyboardInterrupt or Terminated, a second end at once."""
    with _handled(_in_order):
        yield


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Handle signals, but one that is ignored stays so (nohup). torchrun ends its processes itself:
    one that waits for others in a collective operation would never come to handle it."""
    numbers = SIGNALS[:1] if "RANK" in os.environ else SIGNALS
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) in usual}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _in_order(number: int, frame: FrameType | None) -> NoReturn:
    for each in SIGNALS:
        if signal.getsignal(each) is _in_order:
            signal.signal(each, _at_once)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(number)


def _at_once(number: int, frame: FrameType | None) -> NoReturn:
    try:
        os.write(2, f"{stopped_by(number)}\n".encode())
    finally:
        os._exit(128 + number)


def stopped_by(number: int) -> str:
    """Say in one line which signal ended the script."""
    name = signal.Signals(number).name
    return f"stopped ({name}); the same command goes on from the last state that was saved"
