"""Test the size that the KV cache may have in main memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quire.engine.devices.cpu import memory as cpu_memory
from quire.engine.devices.cpu.memory import available_memory, cache_memory
from quire.engine.errors import ConfigurationError

from ..worker_driver import make_config

BLOCK = 6144
"""Bytes of one block of 16 tokens."""


def wanted(max_model_len: int = 1024, **config: Any) -> int:
    return cache_memory(make_config(Path("none"), num_blocks=None, **config), BLOCK, max_model_len)


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
    config = make_config(Path("none"), num_blocks=None, max_num_seqs=8)
    assert cache_memory(config, BLOCK, 1024, 500_000) == 200_000
    assert cache_memory(config, BLOCK, 1024, 2_000_000) == 0
    given = make_config(Path("none"), num_blocks=None, kv_cache_memory_bytes=600_000)
    with pytest.raises(ConfigurationError, match="beside the model only"):
        cache_memory(given, BLOCK, 1024, 500_000)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux's count of memory")
def test_available_memory_is_at_most_that_of_the_system() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    available = available_memory()
    assert available is not None and 0 < available <= total
