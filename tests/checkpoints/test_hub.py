"""Published weights by name: what huggingface_hub's client says becomes one line."""

from __future__ import annotations

import errno
import socket
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from checking import assert_refused
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from dmoe_var.checkpoints import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "FoundationVision/var"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; nothing fetched before is remembered."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.fetch.cache_clear()
    yield tmp_path / "cache"
    hub.fetch.cache_clear()


@pytest.fixture
def no_server(cache, monkeypatch):
    """Nobody listens: the connection is refused, and the client does not pause between its tries.
    It compares addresses with ENDPOINT and builds them from it."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        address = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        yield


def test_what_is_in_the_cache_serves_without_a_hub(no_server, cache):
    """As the client leaves a file: by commit, and `main` as a reference to it."""
    assert hub.cached("var_d16") is None
    folder = cache / f"models--{REPOSITORY.replace('/', '--')}"
    path = folder / "snapshots" / COMMIT / "var_d16.pth"
    for file, content in ((folder / "refs" / "main", COMMIT), (path, "weights")):
        file.parent.mkdir(parents=True)
        file.write_text(content)
    assert hub.cached("var_d16") == hub.fetch("var_d16") == path


def test_no_hub(no_server):
    assert_refused(hub.fetch, "var_d16", REPOSITORY, "check your connection")


def test_offline(no_server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(hub.fetch, "var_d16", REPOSITORY, "HF_HUB_OFFLINE")


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HfHubHTTPError("403 Forbidden\n\nCannot access gated repo", response=RESPONSE), "gated"),
        (HfHubHTTPError.__mro__[1]("connection reset"), "connection reset"),
        (LocalEntryNotFoundError("no connection\nand no file in the cache"), "in the cache"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (ConnectionError(), "ConnectionError"),
        (ValueError("not\na name"), "not a name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_client_says_is_one_line(cache, monkeypatch, error, said):
    def download(*_):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_refused(hub.fetch, "var_d16", f"cannot fetch it from {REPOSITORY}: ", said)
