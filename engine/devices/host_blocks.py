"""How the blocks of KV caches lie in slots of host memory, and how they are copied there."""

from __future__ import annotations

import time
from collections import abc
from math import prod
from typing import NamedTuple

import torch

from ..step import BlockLoad, BlockSave
from .backend import HostBlocks

WORD = torch.int64
"""Blocks are copied as words of this type, whatever their values are."""
REPEATS = 4


class Part(NamedTuple):
    """One cache and its part of each slot, as words: block i is `blocks[i]` and slot i is
    `slots[i]`, both `[layers, 2, heads, block_size, words]`."""

    blocks: torch.Tensor
    slots: torch.Tensor


class HostLayout(NamedTuple):
    """The parts of all slots, and the slots as they lie: `[number, words of a slot]`."""

    parts: list[Part]
    slots: torch.Tensor


def host_layout(caches: abc.Sequence[torch.Tensor], memory: memoryview) -> HostLayout:
    """Lay out as many slots as `memory` holds, each for a block of every cache `[layers, 2, blocks,
    heads, block_size, width]`."""
    words = [cache.view(_word_of(caches)) for cache in caches]
    sizes = [prod(cache.shape) // cache.shape[2] for cache in words]
    count = len(memory) // (sum(sizes) * words[0].itemsize)
    whole = torch.frombuffer(memory, dtype=words[0].dtype, count=count * sum(sizes))
    slots = whole.view(count, sum(sizes))
    parts = []
    for cache, slot in zip(words, torch.split(slots, sizes, dim=1), strict=True):
        layers, two, _, heads, block_size, width = cache.shape
        shape = (layers, two, heads, block_size, width)
        parts.append(Part(cache.movedim(2, 0), slot.view(count, *shape)))
    return HostLayout(parts, slots)


def _word_of(caches: abc.Sequence[torch.Tensor]) -> torch.dtype:
    """Return WORD, or bytes if the width of a token and head is no multiple of a word."""
    widths = [cache.shape[-1] * cache.itemsize for cache in caches]
    return torch.uint8 if any(width % WORD.itemsize for width in widths) else WORD


def copy_seconds(blocks: HostBlocks) -> float:
    """Measure the seconds of one block's copy, one way: the best of several. The first block of the
    cache, of which nobody has a part yet, is copied to the first slot and back."""
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        blocks.move(0, [BlockSave(0, 0)], [])
        blocks.move(0, [], [BlockLoad(0, 0)])
        blocks.wait()
        best = min(best, (time.perf_counter() - begin) / 2)
    return max(best, 1e-9)


class DirectBlocks:
    """Implements HostBlocks for a device that has its cache in main memory, too: every copy has
    ended when `move` returns."""

    def __init__(self, caches: abc.Sequence[torch.Tensor], memory: memoryview) -> None:
        self._parts = host_layout(caches, memory).parts

        self._step = 0

    def move(
        self, step: int, saves: abc.Sequence[BlockSave], loads: abc.Sequence[BlockLoad]
    ) -> None:
        for blocks, slots in self._parts:
            for block, slot in saves:
                slots[slot].copy_(blocks[block])
            for slot, block in loads:
                blocks[block].copy_(slots[slot])
        self._step = step

    def ended(self) -> int:
        return self._step

    def wait(self) -> None:
        """Do nothing: there is nothing to wait for."""
