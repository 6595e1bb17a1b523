"""Errors that a user's input causes. A script prints them as one line and exits with status 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong: the message names it, its value and what is allowed.

    Always one line, whatever a file or key that it names is made of.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class ConfigError(InputError):
    """A configuration key is unknown, of a wrong type or out of range."""


class CheckpointError(InputError):
    """A checkpoint file is missing, cut short, incomplete or of another configuration."""


class DataError(InputError):
    """A data set or cached file is missing, unreadable or not what the configuration says."""


class TrainingDiverged(RuntimeError):
    """The loss was not finite; the last good training state stays on disk."""
