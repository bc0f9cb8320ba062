"""Copies blocks of the KV cache to slots of other main memory, and back."""

from __future__ import annotations

from collections import abc

import torch

from ...step import BlockLoad, BlockSave
from ..host_layout import host_layout


class CpuHostBlocks:
    """Implements HostBlocks, which states the contract. Every copy is done when `move` returns."""

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
