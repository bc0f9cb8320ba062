"""Test the environment with which the engine process starts."""

from __future__ import annotations

import pytest

from quire.engine.process.engine_handle import engine_environment

MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}


def test_defaults_for_threads_and_memory() -> None:
    assert engine_environment({"A": "b"}, 3) == {
        "A": "b",
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "10000",
        "OMP_NUM_THREADS": "3",
        **MEMORY,
    }


@pytest.mark.parametrize(
    "own",
    [
        {"OMP_WAIT_POLICY": "active", "MALLOC_TRIM_THRESHOLD_": "1"},
        {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
        {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "2"},
    ],
)
def test_variables_that_are_set_keep_their_values(own: dict[str, str]) -> None:
    assert engine_environment(own, None) == MEMORY | own
