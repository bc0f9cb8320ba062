"""Fixtures of several rooms. The interpreted tests run in a process that interpreting.py starts."""

import os
from collections.abc import Iterator

import pytest

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["devices/interpreted"]


@pytest.fixture
def same_number_of_threads() -> Iterator[None]:
    """Give torch back its number of threads after the test."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
