"""Fetch published weights by name, through huggingface_hub and into its cache."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from dmoe_var.errors import CheckpointError

REPOSITORY = "FoundationVision/var"
PUBLISHED = ("var_d16", "var_d20", "var_d24", "var_d30", "var_d36", "vae_ch160v4096z32")

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
BY_STATUS = {
    401: f"it wants to know who asks: {LOG_IN}",
    403: f"the token may not do this; with one that may, {LOG_IN}",
    404: "there is nothing of that name",
    429: "too many requests; try again later",
}
"""What helps, per HTTP status that the hub answers with."""


@cache
def fetch(name: str) -> Path:
    """Fetch a published file into the local cache, unless it is there, and return its path."""
    from huggingface_hub import hf_hub_download

    with network_errors(f"{name}: cannot fetch it from {REPOSITORY}"):
        return Path(hf_hub_download(REPOSITORY, f"{name}.pth"))


def cached(name: str) -> Path | None:
    """Return the path of a published file in the local cache, or None; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(REPOSITORY, f"{name}.pth")
    return Path(found) if isinstance(found, str) else None


@contextmanager
def network_errors(what: str) -> Iterator[None]:
    """Raise CheckpointError, in one line that says what helps, if the hub cannot be reached or
    refuses, or if the disk is full."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The base class of the HTTP library's errors, whichever library this huggingface_hub uses.
    http_error: type[BaseException] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (LocalEntryNotFoundError, HfHubHTTPError, http_error, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = _advice(error)
        raise CheckpointError(f"{what}{advice and ': '}{advice} ({reason})") from error


def _advice(error: BaseException) -> str:
    """Say what helps against an error of the hub's client; "" if its own words have to do.

    Only classes that every version since 0.26 has are named. All else goes by the status that the
    hub answered, which an error about the cache carries as its cause.
    """
    from huggingface_hub import constants, errors

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    # By error class
    if isinstance(error, errors.GatedRepoError):
        return f"gated: accept its conditions on its page on the hub, then {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one: {LOG_IN}"
    local = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.EntryNotFoundError) and not local:
        return "the repository has no such file"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return LOG_IN
    numbers = {each.errno for each in causes if isinstance(each, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "the disk of the cache is full; HF_HOME names another place"
    # By HTTP status: an error about the cache carries an answer that no hub gave
    cache = errors.LocalEntryNotFoundError
    answers = (getattr(each, "response", None) for each in causes if not isinstance(each, cache))
    codes = (getattr(answer, "status_code", None) for answer in answers)
    status = next((code for code in codes if code is not None), None)
    if status in BY_STATUS:
        return BY_STATUS[status]
    if status is not None:
        return "the hub failed; try again later" if status >= 500 else ""
    # Without any answer
    offline = any(isinstance(each, errors.OfflineModeIsEnabled) for each in causes)
    if offline or (local and constants.HF_HUB_OFFLINE):
        return "not in the cache, and HF_HUB_OFFLINE forbids fetching it"
    if local or isinstance(error, (ConnectionError, TimeoutError)):
        return "not in the cache, and the hub cannot be reached; a path to a copy will do"
    return ""
