"""What happened to the blocks that can be found by their content, for those who follow it: routers
that want to know which engine has which prefix cached.

A block's hash identifies its tokens and all tokens before it (`engine/cache/block_hashes.py`), and
is the same on all machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

KEY_BYTES = 8
"""Length of a block's key. Among a million blocks, two have the same one with a probability below
1 in 10 million, and then a request is routed as if one of them were the other."""


def block_key(block_hash: bytes) -> bytes:
    """Return the start of a block's hash, by which routers know the block."""
    return block_hash[:KEY_BYTES]


class BlocksStored(NamedTuple):
    """A chain of full blocks can be found from now on. `token_ids` are those of all its blocks.

    `parent` is the hash of the block before the first one, or None if the chain begins a prompt.
    Only requests for the LoRA adapter of this name can share them, and only those with the cache
    salt of which `salt` is a digest.
    """

    hashes: list[bytes]
    parent: bytes | None
    token_ids: list[int]
    block_size: int
    adapter: str | None
    salt: str | None


class BlocksRemoved(NamedTuple):
    """Blocks with these hashes cannot be found any more."""

    hashes: list[bytes]


class BlocksCleared(NamedTuple):
    """No block can be found any more."""


BlockEvent = BlocksStored | BlocksRemoved | BlocksCleared


class BlockChanges(NamedTuple):
    """The effect of an engine's events since its last BlockChanges.

    `sequence` counts them from 1, so that a reader notices a gap. If `cleared`, all blocks known
    before are gone. `removed` and `stored` are keys of blocks, one after the other; they have none
    in common, and applying them twice does no harm.
    """

    sequence: int
    cleared: bool
    removed: bytes
    stored: bytes

    @classmethod
    def of(cls, sequence: int, events: Iterable[BlockEvent]) -> BlockChanges:
        """Return what is left of the events: the last one for each block."""
        cleared = False
        is_stored: dict[bytes, bool] = {}
        for event in events:
            match event:
                case BlocksStored(hashes):
                    is_stored |= dict.fromkeys(map(block_key, hashes), True)
                case BlocksRemoved(hashes):
                    is_stored |= dict.fromkeys(map(block_key, hashes), False)
                case BlocksCleared():
                    cleared = True
                    is_stored.clear()
        stored = b"".join(key for key, stays in is_stored.items() if stays)
        removed = b"".join(key for key, stays in is_stored.items() if not stays)
        return cls(sequence, cleared, removed, stored)


def split_keys(keys: bytes) -> list[bytes]:
    """Return the keys that stand one after the other in `keys`. Raises ValueError if the last one
    is cut."""
    if len(keys) % KEY_BYTES:
        raise ValueError(f"{len(keys)} bytes are no keys of {KEY_BYTES} bytes")
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
