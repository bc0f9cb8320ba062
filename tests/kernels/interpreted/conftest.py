"""Helpers of tests/kernels on the path, and the same random inputs every time."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
