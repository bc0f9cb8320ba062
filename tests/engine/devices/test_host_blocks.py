"""Test the copies of blocks to slots of host memory, and back, of both kinds of devices."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from quire.engine.devices import streamed_blocks
from quire.engine.devices.backend import HostBlocks
from quire.engine.devices.host_blocks import DirectBlocks, copy_seconds
from quire.engine.devices.streamed_blocks import StreamedBlocks
from quire.engine.step import BlockLoad, BlockSave

NUM_BLOCKS, NUM_SLOTS = 12, 7

Make = Callable[[list[torch.Tensor], memoryview], HostBlocks]


def direct(caches: list[torch.Tensor], memory: memoryview) -> HostBlocks:
    return DirectBlocks(caches, memory)


def streamed(caches: list[torch.Tensor], memory: memoryview) -> HostBlocks:
    return StreamedBlocks(caches, memory, torch.device("cpu"))


def random_cache(layers: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (layers, 2, NUM_BLOCKS, heads, 16, width)
    return torch.randint(0, 100, shape, dtype=torch.uint8).to(dtype)


@pytest.mark.parametrize("make", [direct, streamed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_blocks_come_back_as_they_were(
    make: Make, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two caches, as with a draft model; the width of one is no multiple of a word if it is of
    bytes. The streamed copies' buffers hold two blocks, so that larger steps take turns."""
    caches = [random_cache(3, 2, 8, dtype), random_cache(1, 1, 20, dtype)]
    block_bytes = sum(cache.numel() // NUM_BLOCKS * cache.itemsize for cache in caches)
    monkeypatch.setattr(streamed_blocks, "BUFFER_BYTES", 2 * block_bytes)
    memory = bytearray(NUM_SLOTS * block_bytes)
    blocks = make(caches, memoryview(memory))
    rng = random.Random(1)
    slots: dict[int, list[torch.Tensor]] = {}
    for step in range(1, 40):
        saved = rng.sample(range(NUM_BLOCKS), rng.randrange(6))
        saves = list(map(BlockSave, saved, rng.sample(range(NUM_SLOTS), len(saved))))
        for block, slot in saves:
            slots[slot] = [cache[:, :, block].clone() for cache in caches]
        loaded = rng.sample(sorted(slots), min(len(slots), rng.randrange(6)))
        loads = list(map(BlockLoad, loaded, rng.sample(range(NUM_BLOCKS), len(loaded))))
        wanted = [cache.clone() for cache in caches]
        for slot, block in loads:
            for cache, content in zip(wanted, slots[slot], strict=True):
                cache[:, :, block] = content
        blocks.move(step, saves, loads)
        assert blocks.ended() == step
        assert all(map(torch.equal, caches, wanted))
        for cache in caches:  # what a forward writes
            cache[:, :, rng.randrange(NUM_BLOCKS)] = rng.randrange(100)
    # A slot has the bytes of its blocks, one cache after the other.
    for slot, contents in slots.items():
        found = memory[slot * block_bytes : (slot + 1) * block_bytes]
        own = [content.contiguous().view(torch.uint8).numpy().tobytes() for content in contents]
        assert bytes(found) == b"".join(own)


@pytest.mark.parametrize("make", [direct, streamed])
def test_a_copy_is_timed_without_a_trace(make: Make) -> None:
    cache = random_cache(2, 2, 8, torch.float32)
    before = cache.clone()
    blocks = make([cache], memoryview(bytearray(4 * cache.numel() // NUM_BLOCKS * 4)))
    assert 0 < copy_seconds(blocks) < 10
    assert torch.equal(cache, before)
