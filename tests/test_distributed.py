"""Joining other processes: what torchrun sets counts, and no wait is silent or without an end."""

from __future__ import annotations

import re
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dmoe_var import distributed
from dmoe_var.errors import InputError

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.fixture
def environment(monkeypatch):
    """environment(variables): these and no others of torchrun's."""

    def environment(variables):
        for name in (*WHOLE, "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return environment


@pytest.fixture
def port():
    """One that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"RANK": "1", "LOCAL_RANK": "x"},
        {**WHOLE, "MASTER_ADDR": ""},
        {**WHOLE, "WORLD_SIZE": "1", "LOCAL_RANK": "3"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
    ],
)
def test_what_is_left_over_counts_for_nothing(environment, variables):
    environment(variables)
    assert (distributed.launched_processes(), distributed.local_rank()) == (1, 0)
    assert distributed.launched_as_main()
    distributed.start(torch.device("cpu"))
    assert not dist.is_initialized()


def test_what_torchrun_sets_counts(environment):
    environment({**WHOLE, "RANK": "1", "LOCAL_RANK": "1"})
    assert (distributed.launched_processes(), distributed.local_rank()) == (2, 1)
    assert not distributed.launched_as_main()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "two"),
        ("WORLD_SIZE", "0"),
        ("RANK", "-1"),
        ("RANK", "2"),
        ("MASTER_PORT", "x"),
        ("LOCAL_RANK", "x"),
    ],
)
def test_what_torchrun_would_not_set(environment, name, value):
    environment({**WHOLE, name: value})
    with pytest.raises(InputError, match=f"^{name}={re.escape(value)}") as caught:
        distributed.local_rank()
    assert "\n" not in str(caught.value)


def test_nobody_else_comes(environment, port, monkeypatch, capfd):
    """Said after seconds, ended after minutes: here both are short."""
    environment({**WHOLE, "MASTER_PORT": port})
    monkeypatch.setattr(distributed, "SILENCE", 0.1)
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=1))
    place = re.escape(f"127.0.0.1:{port}")
    with pytest.raises(InputError, match=f"^WORLD_SIZE=2, RANK=0: .* at {place} .*unset") as caught:
        distributed.start(torch.device("cpu"))
    assert "\n" not in str(caught.value)
    said = f"waiting for 2 processes at 127.0.0.1:{port} (WORLD_SIZE=2, RANK=0)\n"
    assert said in capfd.readouterr().err
    assert not dist.is_initialized()


def test_a_place_that_is_taken(environment, monkeypatch):
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=2))
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        environment({**WHOLE, "MASTER_PORT": str(port)})
        with pytest.raises(InputError, match=f"did not meet at 127.0.0.1:{port}"):
            distributed.start(torch.device("cpu"))
