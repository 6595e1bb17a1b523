"""Errors of the system as sentences."""

from __future__ import annotations

import errno
import os

import pytest

from dmoe_var.errors import sentence


@pytest.mark.parametrize("code", ["EPIPE", "ENOSPC"])
def test_no_line_begins_with_none(code):
    number = getattr(errno, code)
    reason = os.strerror(number)
    assert sentence(OSError(number, reason)).startswith(f"{code}: {reason}")
    assert sentence(OSError(number, reason, "some/file")) == f"some/file: {reason}"


def test_a_librarys_own_text():
    """Errors of many libraries are OSErrors with a text alone."""
    assert sentence(OSError("the hub\n cannot be reached")) == "the hub cannot be reached"
    assert sentence(ConnectionError()) == "ConnectionError"
    assert sentence(OSError(errno.EIO, "bad", b"bytes")) == "bytes: bad"
