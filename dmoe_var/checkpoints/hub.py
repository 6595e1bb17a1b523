"""Fetch published weights by name, through huggingface_hub and into its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from dmoe_var.errors import CheckpointError

REPOSITORY = "FoundationVision/var"
PUBLISHED = ("var_d16", "var_d20", "var_d24", "var_d30", "var_d36", "vae_ch160v4096z32")
SAID = 500
"""Most characters of the client's own words in an error."""


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
    """Raise CheckpointError in one line if the hub cannot be reached or refuses, or if the disk is
    full. The hub's client says what helps, at times in the error that caused the one it raises."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The base class of the HTTP library's errors, whichever library this huggingface_hub uses.
    http_error: type[BaseException] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (LocalEntryNotFoundError, HfHubHTTPError, http_error, OSError, ValueError) as error:
        said = [
            " ".join(str(each).split()) or type(each).__name__
            for each in (error, error.__cause__)
            if each is not None
        ]
        raise CheckpointError(f"{what}: {'; '.join(said)[:SAID]}") from error
