"""Test the size that the KV cache may have in main memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quire.engine.devices.backend import CacheDemand
from quire.engine.devices.cpu import memory as cpu_memory
from quire.engine.devices.cpu.memory import available_memory, cache_memory
from quire.engine.errors import ConfigurationError

from ..worker_driver import make_config

BLOCK = 6144
"""Bytes of one block of 16 tokens."""


def wanted(
    max_model_len: int = 1024,
    adapter_bytes: int = 0,
    windows: tuple[int | None, ...] = (None,),
    **config: Any,
) -> int:
    given = make_config(Path("none"), num_blocks=None, **config)
    demand = CacheDemand(given, "Test", BLOCK, windows, max_model_len, adapter_bytes)
    return cache_memory(demand, 64)


def test_the_default_fits_typical_sequences_within_a_share_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_memory, "available_memory", lambda: 10**12)
    assert wanted(max_num_seqs=8) == 8 * 1024 // 16 * BLOCK
    assert wanted(9000, max_num_seqs=1) == 563 * BLOCK
    monkeypatch.setattr(cpu_memory, "available_memory", lambda: 1_000_000)
    assert wanted(max_num_seqs=8) == 400_000
    monkeypatch.setattr(cpu_memory, "available_memory", lambda: None)
    assert wanted(max_num_seqs=8) == 8 * 1024 // 16 * BLOCK


def test_more_than_the_available_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "available_memory", lambda: 1_000_000)
    assert wanted(kv_cache_memory_bytes=12345) == 12345
    assert wanted(kv_cache_memory_bytes=1_000_000) == 1_000_000
    with pytest.raises(ConfigurationError, match="--kv-cache-memory is 0.00 GiB, but beside"):
        wanted(kv_cache_memory_bytes=1_000_001)


def test_what_adapters_will_take_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "available_memory", lambda: 1_000_000)
    assert wanted(adapter_bytes=500_000, max_num_seqs=8) == 200_000
    assert wanted(adapter_bytes=2_000_000, max_num_seqs=8) == 0
    with pytest.raises(ConfigurationError, match="beside the model only"):
        wanted(adapter_bytes=500_000, kv_cache_memory_bytes=600_000)


def test_windows_need_room_for_themselves_and_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "available_memory", lambda: None)
    full, windowed = 8 * 1024 // 16, 8 * (100 // 16 + 1 + 2) + 64 // 16
    assert wanted(windows=(None, 100), max_num_seqs=8) == (full + windowed + 1) * BLOCK
    alone = 563 + (100 // 16 + 1 + 1) + 2 * 64 // 16
    assert wanted(9000, windows=(None, 100), max_num_seqs=1) == (alone + 1) * BLOCK


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux's count of memory")
def test_available_memory_is_at_most_that_of_the_system() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    available = available_memory()
    assert available is not None and 0 < available <= total
