"""Drafts from the prefix index: what another sequence with the same prefix went on with.

A repeated request, a sibling of n choices and an agent's retry find the whole answer there. It
costs one look-up, and respects cache salts, because the chain of hashes begins with the salt.
"""

from __future__ import annotations

from ..cache.block_manager import BlockManager
from ..sequence import Sequence


class CachedDrafter:
    """Reads the tokens that blocks of the index hold after a sequence's own."""

    name = "cached"
    prior = 0.6

    def __init__(self, block_manager: BlockManager) -> None:
        self._block_manager = block_manager

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        return self._block_manager.continuation(sequence, k)

    def forget(self, seq_id: int) -> None:
        """Do nothing: nothing is kept."""
