from __future__ import annotations

import pytest
import torch


@pytest.fixture
def set_threads():
    """set_threads(n): torch uses n threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
