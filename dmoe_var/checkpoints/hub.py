"""Published weights by name, through huggingface_hub into its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from dmoe_var.errors import CheckpointError

REPOSITORY = "FoundationVision/var"
PUBLISHED = ("var_d16", "var_d20", "var_d24", "var_d30", "var_d36", "vae_ch160v4096z32")


@cache
def fetch(name: str) -> Path:
    """Path of a published file in the local cache, downloaded where it is not there yet."""
    from huggingface_hub import hf_hub_download

    with network_errors(f"{name}: cannot fetch it from {REPOSITORY}"):
        return Path(hf_hub_download(REPOSITORY, f"{name}.pth"))


@contextmanager
def network_errors(what: str) -> Iterator[None]:
    """CheckpointError, in one line, for a hub that cannot be reached, refuses, or a full disk."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The base class of the HTTP library's errors, whichever library this huggingface_hub uses.
    http_error: type[BaseException] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (LocalEntryNotFoundError, HfHubHTTPError, http_error, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{what} ({reason})") from error
