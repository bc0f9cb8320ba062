"""Records which blocks become known to the prefix index and which are lost, while somebody follows
it."""

from __future__ import annotations

from collections import abc
from hashlib import sha256

from ..events.block_events import BlockEvent, BlocksCleared, BlocksRemoved, BlocksStored


class BlockRecorder:
    """Collects events in their order, and joins those that follow one another."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._events: list[BlockEvent] = []

    def stored(
        self,
        own_hash: bytes,
        parent: bytes | None,
        token_ids: abc.Sequence[int],
        adapter: str | None,
        cache_salt: str | None,
    ) -> None:
        """Record that a full block can be found; `parent` is None for a prompt's first block."""
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksStored) and last.hashes[-1] == parent:
            last.hashes.append(own_hash)
            last.token_ids.extend(token_ids)
            return
        salt = None if cache_salt is None else _digest(cache_salt)
        event = BlocksStored([own_hash], parent, list(token_ids), self._block_size, adapter, salt)
        self._events.append(event)

    def removed(self, own_hash: bytes) -> None:
        """Record that a full block cannot be found any more."""
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksRemoved):
            last.hashes.append(own_hash)
        else:
            self._events.append(BlocksRemoved([own_hash]))

    def cleared(self) -> None:
        """Record that no block can be found any more, in the place of all that was recorded."""
        self._events = [BlocksCleared()]

    def take(self) -> list[BlockEvent]:
        """Return the events since this was last called."""
        events, self._events = self._events, []
        return events


def _digest(cache_salt: str) -> str:
    """Return what stands for a salt where it can be read: the salt itself is a secret."""
    return sha256(b"shown salt:" + cache_salt.encode()).hexdigest()[:16]
