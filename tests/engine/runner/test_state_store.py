"""Test that states are copied as if one copy was made after the other."""

from __future__ import annotations

import random

import pytest

from quire.engine.config import EngineConfig
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.runner.state_store import make_state_store
from quire.engine.states.state_spec import StateSpec
from quire.engine.step import StateCopy

SPEC = StateSpec(2, channels=3, taps=2, heads=1, key_dim=2, value_dim=2)


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_made_in_order(seed: int) -> None:
    """Sources may be earlier destinations, and destinations may repeat."""
    store = make_state_store(EngineConfig(model="none"), SPEC, CpuBackend(), 6)
    assert store is not None
    chance = random.Random(seed)
    for slot in range(6):
        store.step.convolution[:, slot] = slot
        store.step.recurrent[:, slot] = 10 + slot
    expected = list(range(6))
    copies = [StateCopy(chance.randrange(6), chance.randrange(6)) for _ in range(8)]
    for source, destination in copies:
        expected[destination] = expected[source]
    store.copy(copies)
    for slot, content in enumerate(expected):
        assert (store.step.convolution[:, slot] == content).all()
        assert (store.step.recurrent[:, slot] == 10 + content).all()


def test_a_model_without_states_has_no_store() -> None:
    assert make_state_store(EngineConfig(model="none"), None, CpuBackend(), 6) is None
