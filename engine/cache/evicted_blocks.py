"""The protocol of whoever keeps the content of blocks that the pool reuses."""

from __future__ import annotations

from collections import abc
from typing import Protocol


class EvictedBlocks(Protocol):
    """Keeps blocks by their hashes. What it does takes part in the step that is being planned."""

    def take(self, block: int, own_hash: bytes | None) -> None:
        """Keep the content of a block, which the step that is being planned may overwrite. The hash
        is None if the block is not full."""

    def holds(self, own_hash: bytes) -> bool:
        """Return whether a block is kept, as far as is known."""

    def hashes(self) -> abc.Set[bytes]:
        """Return the hashes of all blocks that are kept, as far as is known."""

    def discard(self, hashes: abc.Iterable[bytes]) -> None:
        """Forget blocks: what they hold must not be shared."""
