"""Compare what adapters add on the CPU with plain torch, and prove that rows are independent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quire.kernels.cpu.lora.deltas import RUN_ROWS, find_runs, run_deltas
from quire.kernels.cpu.lora.slots import Slots

SIZES = (40, 33, 7)
IN = 1100
"""More than one slice of features, and no multiple of a panel."""


def random_slots(ranks: list[list[int]], max_rank: int = 70) -> tuple[Slots, Any]:
    """Return slots of one layer with these ranks by slot and part, and the weights in them."""
    slots = Slots.allocate(len(ranks), 1, IN, SIZES, max_rank)
    generator = np.random.default_rng(0)
    weights: dict[tuple[int, int], Any] = {}
    for slot, of_parts in enumerate(ranks):
        for part, (rank, size) in enumerate(zip(of_parts, SIZES, strict=True)):
            if rank:
                a = generator.standard_normal((rank, IN), dtype=np.float32) / 30
                b = generator.standard_normal((size, rank), dtype=np.float32)
                weights[slot, part] = a, b
            slots.write(slot, 0, part, weights.get((slot, part)))
    return slots, weights


def expected(x: np.ndarray, slots: np.ndarray, weights: Any) -> np.ndarray:
    out = np.zeros((len(x), sum(SIZES)), dtype=np.float64)
    for row, slot in enumerate(slots.tolist()):
        left = 0
        for part, size in enumerate(SIZES):
            if (slot, part) in weights:
                a, b = (each.astype(np.float64) for each in weights[slot, part])
                out[row, left : left + size] = b @ (a @ x[row].astype(np.float64))
            left += size
    return out


def run(slots: Slots, x: np.ndarray, token_slots: np.ndarray, threads: int = 1) -> np.ndarray:
    out = np.full((len(x), sum(SIZES)), 7, dtype=np.float32)
    run_deltas(slots, x, out, find_runs(token_slots), threads)
    return out


@pytest.fixture(scope="module")
def made() -> tuple[Slots, Any]:
    return random_slots([[1, 8, 64], [70, 0, 3], [0, 33, 0]])


def test_deltas_equal_the_formula(made: tuple[Slots, Any]) -> None:
    slots, weights = made
    x = np.random.default_rng(1).standard_normal((60, IN), dtype=np.float32)
    token_slots = np.repeat(np.array([0, -1, 2, 1, 1, 0]), 10)
    out = run(slots, x, token_slots)
    without = token_slots < 0
    assert (out[without] == 7).all()
    np.testing.assert_allclose(
        out[~without], expected(x, token_slots, weights)[~without], atol=2e-4
    )


def test_a_row_is_the_same_in_any_run(made: tuple[Slots, Any]) -> None:
    slots, _ = made
    rows = 2 * RUN_ROWS + 3
    x = np.random.default_rng(2).standard_normal((rows, IN), dtype=np.float32)
    together = run(slots, x, np.ones(rows, np.int64), torch.get_num_threads())
    for row in range(rows):
        assert (run(slots, x[row : row + 1], np.ones(1, np.int64)) == together[row]).all()
    mixed = np.arange(rows) % 3 - 1
    apart = run(slots, x, mixed)
    assert (apart[mixed == 1] == together[mixed == 1]).all()


def test_a_slot_that_is_written_again_forgets_what_it_held() -> None:
    slots, _ = random_slots([[70, 70, 70]])
    again, weights = random_slots([[3, 0, 33]])
    for part in range(3):
        slots.write(0, 0, part, weights.get((0, part)))
    x = np.random.default_rng(3).standard_normal((5, IN), dtype=np.float32)
    token_slots = np.zeros(5, np.int64)
    assert (run(slots, x, token_slots) == run(again, x, token_slots)).all()


def test_runs_have_one_slot_and_a_bounded_length() -> None:
    token_slots = np.array([-1, 2, 2, -1, 0] + [1] * (RUN_ROWS + 2))
    assert find_runs(token_slots).tolist() == [
        [2, 1, 2],
        [0, 4, 1],
        [1, 5, RUN_ROWS],
        [1, 5 + RUN_ROWS, 2],
    ]
    assert find_runs(np.full(3, -1)).shape == find_runs(np.empty(0, np.int64)).shape == (0, 3)
