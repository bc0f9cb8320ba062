"""Put the helpers of tests/kernels on the path, and seed torch for every test."""

import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("these tests run under Triton's interpreter: set TRITON_INTERPRET=1")
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
