"""Published weights by name, against a hub of our own on 127.0.0.1 and the real client.

The server speaks what huggingface_hub asks of a file: HEAD with ETag and commit, GET with Range.
"""

from __future__ import annotations

import errno
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from dmoe_var import load_var
from dmoe_var.checkpoints import hub
from dmoe_var.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "/FoundationVision/var/resolve/main/var_d16.pth"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.server.state.asked.append(("HEAD", self.path, None))
        self._start(0)

    def do_GET(self):
        state, asked = self.server.state, self.headers.get("Range")
        state.asked.append(("GET", self.path, asked))
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if not self._start(start):
            return
        state.served += 1
        rest = state.content[start:]
        broken = state.served <= state.break_first
        self.wfile.write(rest[: len(rest) // 2] if broken else rest)
        self.close_connection = broken

    def _start(self, start):
        """Status and headers; False where there is no such file."""
        state = self.server.state
        commit = "/resolve/" + COMMIT + "/"
        found = self.path.replace(commit, "/resolve/main/") == FILE and state.status == 200
        self.send_response(
            (206 if start else 200) if found else state.status if state.status != 200 else 404
        )
        if found:
            size = len(state.content)
            self.send_header("ETag", '"the-only-version"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(size - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_header("X-Error-Code", state.code)
            self.send_header("Content-Length", "0")
        self.end_headers()
        return found


@pytest.fixture
def no_waiting(monkeypatch):
    """The client retries after pauses, up to 23 seconds in all."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def cache(tmp_path, monkeypatch, no_waiting):
    """An empty cache folder; nothing fetched before is remembered."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    hub.fetch.cache_clear()
    yield tmp_path / "cache"
    hub.fetch.cache_clear()


def go_to(monkeypatch, port):
    """Make this the hub. The client compares addresses with ENDPOINT and builds them from it."""
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip


@pytest.fixture
def server(cache, monkeypatch, make_var, tmp_path):
    """A hub that has var_d16.pth (a tiny VAR); its state can be changed."""
    torch.save(make_var().state_dict(), tmp_path / "var.pth")
    content = (tmp_path / "var.pth").read_bytes()
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.state = SimpleNamespace(
        content=content, asked=[], served=0, break_first=0, status=200, code="EntryNotFound"
    )
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    go_to(monkeypatch, running.server_port)
    yield running.state
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def no_server(cache, monkeypatch):
    """Nobody listens: the connection is refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        go_to(monkeypatch, taken.getsockname()[1])
        yield


def assert_refused(*said):
    with pytest.raises(CheckpointError) as caught:
        hub.fetch("var_d16")
    message = str(caught.value)
    assert "\n" not in message
    assert all(text in message for text in ("var_d16", "FoundationVision/var", *said)), message


def gets(state):
    return [
        asked for method, path, asked in state.asked if method == "GET" and path.endswith("pth")
    ]


def in_cache(cache, content):
    """As the client leaves a file: by commit, and `main` as a reference to it."""
    folder = cache / "models--FoundationVision--var"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    path = folder / "snapshots" / COMMIT / "var_d16.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


# Downloads


def test_a_file_is_downloaded_once(server, cache, make_var):
    path = hub.fetch("var_d16")
    assert path.is_relative_to(cache)
    assert path.read_bytes() == server.content
    assert torch.equal(load_var("var_d16").head.weight, make_var().head.weight)
    asked = list(server.asked)
    assert hub.fetch("var_d16") == path
    assert (server.asked, gets(server)) == (asked, [None])  # not even a HEAD in the same process
    hub.fetch.cache_clear()
    assert hub.fetch("var_d16") == path
    assert gets(server) == [None]  # and no second download in the next


def test_what_is_in_the_cache_is_known_without_asking(no_server, cache):
    assert hub.cached("var_d16") is None
    path = in_cache(cache, b"weights")
    assert hub.cached("var_d16") == path


def test_an_interrupted_download_goes_on_where_it_stopped(server):
    """The client writes chunks (of 10 MiB): what it has written is not sent again."""
    server.content, server.break_first = random.Random(0).randbytes(24 * 2**20), 1
    assert hub.fetch("var_d16").read_bytes() == server.content
    assert gets(server) == [None, f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"]


def test_a_download_that_is_always_interrupted(server, cache):
    """One line; no half file under its name; the next try has the whole file."""
    server.break_first = 10**6
    for _ in range(2):
        assert_refused()
        assert not list(cache.rglob("var_d16.pth"))
    server.break_first = 0
    assert hub.fetch("var_d16").read_bytes() == server.content


@pytest.mark.parametrize(
    ("status", "code", "helps"),
    [
        (404, "EntryNotFound", "no such file"),
        (404, "RepoNotFound", "hf auth login"),
        (401, "RepoNotFound", "hf auth login"),
        (401, "", "hf auth login"),
        (403, "GatedRepo", "accept its conditions"),
        (403, "", "with one that may"),
        (429, "", "try again later"),
        (500, "", "try again later"),
    ],
)
def test_a_hub_that_refuses(server, cache, status, code, helps):
    server.status, server.code = status, code
    assert_refused(helps)
    server.status = 200
    assert hub.fetch("var_d16").read_bytes() == server.content  # the failure is not remembered


def test_no_hub(no_server):
    assert_refused("cannot be reached")


def test_a_cached_file_serves_without_a_hub(no_server, cache):
    path = in_cache(cache, b"weights")
    assert hub.fetch("var_d16") == path


@pytest.mark.parametrize("cached", [True, False])
def test_offline(server, cache, monkeypatch, cached):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = in_cache(cache, b"weights") if cached else None
    if cached:
        assert hub.fetch("var_d16") == path
    else:
        assert_refused("HF_HUB_OFFLINE")
    assert server.asked == []


def test_a_cached_file_serves_where_the_hub_fails(server, cache):
    path = in_cache(cache, b"weights")
    server.status, server.code = 503, ""
    assert hub.fetch("var_d16") == path


# Disks


def test_a_full_disk(server, cache, full_disk):
    with full_disk(1000):
        assert_refused("too large")
    assert not list(cache.rglob("var_d16.pth"))
    assert hub.fetch("var_d16").read_bytes() == server.content


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses(cache, monkeypatch, number):
    def download(*_):
        raise OSError(number, f"error {number}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_refused(f"error {number}")


def test_a_cache_that_is_a_file(server, cache):
    cache.write_text("in the way")
    assert_refused()
