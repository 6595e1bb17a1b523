"""Published weights by name, through huggingface_hub into its cache."""

from __future__ import annotations

from pathlib import Path

from dmoe_var.errors import CheckpointError

REPOSITORY = "FoundationVision/var"
PUBLISHED = ("var_d16", "var_d20", "var_d24", "var_d30", "var_d36", "vae_ch160v4096z32")


def fetch(name: str) -> Path:
    """Path of a published file in the local cache, downloaded where it is not there yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(REPOSITORY, f"{name}.pth"))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: cannot fetch it from {REPOSITORY} ({reason})") from error
