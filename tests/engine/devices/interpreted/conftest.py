"""Check the kernels' accesses to memory; the sanitizer is in tests/kernels."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "kernels"))
from sanitizer import checked_memory  # noqa: E402


@pytest.fixture(autouse=True)
def sanitizer() -> Iterator[None]:
    """Fail a test whose kernels leave their tensors."""
    with checked_memory():
        yield
