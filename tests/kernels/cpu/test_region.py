"""Threads take each item of a phase exactly once, however many they take at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from quire.kernels.cpu.kernel import kernel_in_chunks
from quire.kernels.cpu.region import run_calls


class Count(NamedTuple):
    counts: Any


def count(item: Any, layer: Any, rows: Any, thread: Any, work: Any) -> None:
    """Count an item."""
    work.counts[item] += rows


@pytest.mark.parametrize("chunk", [0, 1, 3, 8, 1000])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_each_item_is_taken_once(chunk: int, num_threads: int) -> None:
    counting = kernel_in_chunks(chunk)(count)
    numbers = (0, 1, 2, 7, 8, 9, 64, 301)
    works = [Count(np.zeros(number + 2, np.int64)) for number in numbers]
    calls = [((counting, work), number) for work, number in zip(works, numbers, strict=True)]
    run_calls(calls, 5, num_threads)
    for work, number in zip(works, numbers, strict=True):
        assert work.counts.tolist() == [5] * number + [0, 0]
