"""Every test draws the same random numbers, whatever has run before it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed what torch draws without a generator."""
    torch.manual_seed(0)
