"""Compare the best tokens of rows of logits with NumPy's."""

from __future__ import annotations

import numpy as np
import pytest

from quire.kernels.cpu.region import launch
from quire.kernels.cpu.sampling import Best, find_best

INF, NAN = np.inf, np.nan
SIZES = [1, 5, 255, 256, 257, 1000]


def best_of(logits: np.ndarray) -> Best:
    count = len(logits)
    outputs = np.zeros(count, np.float32), np.full(count, -1), np.zeros(count, np.bool_)
    best = Best(logits, logits.view(np.int32), *outputs)
    launch(find_best, best, count, count, 1)
    return best


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_first_of_the_greatest(size: int) -> None:
    random = np.random.default_rng(size)
    rows = [
        random.standard_normal(size),
        -np.abs(random.standard_normal(size)) - 1,
        random.integers(-3, 3, size),
        np.full(size, -2.5),
        np.where(np.arange(size) % 2 == 0, -0.0, 0.0),
        np.where(np.arange(size) == size // 2, -1e30, -INF),
        np.where(np.arange(size) == size - 1, 1e-45, -1e-45),
    ]
    logits = np.array(rows, dtype=np.float32)
    best = best_of(logits)
    assert best.finite.all()
    assert best.token_ids.tolist() == logits.argmax(axis=1).tolist()
    assert best.values.tolist() == logits.max(axis=1).tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("odd", [NAN, -NAN, INF])
def test_a_row_with_a_number_that_is_none_is_not_finite(size: int, odd: float) -> None:
    logits = np.random.default_rng(size).standard_normal((size + 1, size)).astype(np.float32)
    logits[range(size), range(size)] = odd
    best = best_of(logits)
    assert best.finite.tolist() == [False] * size + [True]
    assert np.isnan(best.values[:size]).all()
    assert best.token_ids[:size].tolist() == [0] * size


def test_a_row_of_nothing_but_negative_infinities_is_not_finite() -> None:
    best = best_of(np.full((1, 300), -INF, dtype=np.float32))
    assert not best.finite[0] and best.token_ids[0] == 0
