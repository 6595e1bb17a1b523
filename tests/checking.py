"""Checks that tests of several files share."""

from __future__ import annotations

import pytest
import torch

from dmoe_var.errors import InputError


def same(model, other):
    """Whether two models hold the same tensors by the same names, bit by bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def assert_refused(load, source, *said, **options):
    """load(source, **options) fails in one line that names the source and says all of this."""
    with pytest.raises(InputError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 5000
    assert [text for text in (str(source), *said) if text not in message] == [], message
