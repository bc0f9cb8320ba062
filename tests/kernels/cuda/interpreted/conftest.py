"""Put the helpers of tests/kernels on the path, seed torch, and check the kernels' accesses."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("these tests run under Triton's interpreter: set TRITON_INTERPRET=1")
sys.path.append(str(Path(__file__).parents[2]))
from sanitizer import checked_memory  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def sanitizer() -> Iterator[None]:
    """Fail a test whose kernels leave their tensors."""
    with checked_memory():
        yield
