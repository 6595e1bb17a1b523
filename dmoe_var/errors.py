"""Errors that a user's input causes. A script prints them as one line and exits with status 2."""

from __future__ import annotations

import errno
import os


class InputError(ValueError):
    """Something the user gave is wrong: the message names it, its value and what is allowed.

    The message is always one line, even if a file or key that it names has several.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class ConfigError(InputError):
    """A configuration key is unknown, of a wrong type or out of range."""


class CheckpointError(InputError):
    """A checkpoint file is missing, cut short, incomplete or made by another configuration."""


class DataError(InputError):
    """A data set or cached file is missing, unreadable or not what the configuration says."""


class TrainingDiverged(RuntimeError):
    """The loss was not finite. The last good training state stays on the disk."""


def sentence(error: OSError) -> str:
    """Say in one line what the system refused: the file, if the error names one, and the reason.

    An error without a file is about the whole machine (no locks, too many open files). One without
    a number has a library's own text.
    """
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.filename is not None:
        named = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
        return f"{named}: {reason}"
    code = errno.errorcode.get(error.errno or 0)
    return f"{code}: {reason}, says the system of this machine" if code else reason
