"""The index that finds a block by the tokens whose K/V it holds and all tokens before them.

A block is reached through its *parent hash*: the chained hash of all tokens before it (and of the
cache salt and the LoRA adapter, which seed the chain). Equal parent hashes mean that the whole
prefixes are equal.

    root ──▶ [t0 … t15] ──▶ [t16 … t31] ──▶ [t32 t33 t34]        full, full, partial
                        └─▶ [t16 … t24 u9 …]                      a sibling

A full block is found by its own hash in one look-up. At the end of the chain of full blocks, the
successor that shares the longest prefix with the wanted tokens is found among the siblings, full
or partial. Its first tokens can be copied, so sharing is exact to the token. If layers have several
groups of blocks, each group has hashes of its own (`block_hashes.of_group`), and those who follow
the index hear of the first group's. Hashed chains are the
idea of vLLM's automatic prefix caching; token-granular matches are that of SGLang's RadixAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..sequence import Sequence
from .block_hashes import HASH_BYTES, hash_block, is_first_group
from .block_recorder import BlockRecorder

MAX_SIBLINGS = 32
"""Siblings to compare, newest first. Bounds the search if thousands of prompts start alike."""


class _Entry:
    """The content of a block. While its sequence (`owner`) fills it, the tokens are read there."""

    __slots__ = ("hash", "owner", "parent", "start", "token_ids")

    def __init__(self, parent: bytes, token_ids: list[int], own_hash: bytes | None) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.hash = own_hash
        self.owner: Sequence | None = None
        self.start = 0

    def tokens(self) -> list[int]:
        """Return the tokens whose K/V the block holds."""
        owner = self.owner
        if owner is None:
            return self.token_ids
        return owner.token_ids[self.start : owner.num_computed_tokens]


class Successor(NamedTuple):
    """A block whose first `num_tokens` slots hold the K/V of the wanted tokens."""

    block: int
    num_tokens: int


class PrefixIndex:
    """Maps tokens to blocks.

    Invariant: a block has at most one entry, and holds the K/V of the entry's tokens.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._by_hash: dict[bytes, int] = {}
        self._siblings: dict[tuple[bytes, int], dict[int, None]] = {}
        self._latest: dict[bytes, int] = {}
        """Parent hash → the block that was indexed last after it."""
        self.recorder: BlockRecorder | None = None
        """Told of all full blocks that are lost, while somebody follows them."""
        self.is_kept: Callable[[bytes], bool] = lambda own_hash: False
        """Whether a full block is not lost with its entry here, since it is kept elsewhere."""

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, own_hash: bytes) -> int | None:
        """Return the full block whose content and whole prefix hash to `own_hash`."""
        return self._by_hash.get(own_hash)

    def find_successor(self, parent: bytes, wanted: list[int]) -> Successor | None:
        """Find the block after `parent` that shares the most leading tokens with `wanted`.

        Returns None if no block shares any.
        """
        if not wanted:
            return None
        best, best_length = -1, 0
        siblings = self._siblings.get((parent, wanted[0]), {})
        for _, block in zip(range(MAX_SIBLINGS), reversed(siblings), strict=False):
            length = _common_prefix(self._entries[block].tokens(), wanted)
            if length > best_length:
                best, best_length = block, length
                if length == len(wanted):
                    break
        return Successor(best, best_length) if best_length else None

    def continuation(self, parent: bytes, tail: list[int], k: int, asking: Sequence) -> list[int]:
        """Return up to `k` tokens that another sequence than `asking` has after the tokens of
        `parent` and `tail`, which are less than a block."""
        found: list[int] = []
        while len(found) < k:
            entry = self._entry_after(parent, tail, asking)
            if entry is None:
                break
            found += entry.tokens()[len(tail) :]
            if entry.hash is None:
                break
            parent, tail = entry.hash, []
        return found[:k]

    def _entry_after(self, parent: bytes, tail: list[int], asking: Sequence) -> _Entry | None:
        """Return an entry that holds `tail` and more after it; the newest, if there are several."""
        if not tail:
            block = self._latest.get(parent)
            entry = None if block is None else self._entries[block]
            return None if entry is None or entry.owner is asking or not entry.tokens() else entry
        siblings = self._siblings.get((parent, tail[0]), {})
        for _, block in zip(range(MAX_SIBLINGS), reversed(siblings), strict=False):
            entry = self._entries[block]
            if entry.owner is not asking:
                tokens = entry.tokens()
                if len(tokens) > len(tail) and tokens[: len(tail)] == tail:
                    return entry
        return None

    def hash_of(self, block: int) -> bytes | None:
        """Return the hash of a block that has an entry, or None if it is not full."""
        return self._entries[block].hash

    def hashes(self) -> list[bytes]:
        """Return the hashes of all full blocks of the first group that can be found."""
        return list(filter(is_first_group, self._by_hash))

    def add_full(self, block: int, parent: bytes, own_hash: bytes, token_ids: list[int]) -> bool:
        """Index a full block, unless another block with the same content is indexed already.

        Returns whether its content was new.
        """
        entry = self._entries.get(block)
        if own_hash in self._by_hash:
            self.forget(block)
            return False
        if entry is not None and entry.owner is not None:  # indexed as live, under the right key
            entry.token_ids, entry.hash, entry.owner = token_ids, own_hash, None
            self._by_hash[own_hash] = block
        else:
            self.forget(block)
            self._by_hash[own_hash] = block
            self._insert(block, _Entry(parent, token_ids, own_hash))
        return True

    def add_live(self, block: int, parent: bytes, owner: Sequence, start: int) -> None:
        """Index the block that `owner` is filling; `start` is its first token's position."""
        self.forget(block)
        entry = _Entry(parent, owner.token_ids[start : start + 1], None)
        entry.owner, entry.start = owner, start
        self._insert(block, entry)

    def freeze(self, block: int, owner: Sequence) -> None:
        """Keep the tokens that `owner` has computed so far, because it is releasing the block."""
        entry = self._entries.get(block)
        if entry is not None and entry.owner is owner:
            entry.token_ids = entry.tokens()
            entry.owner = None

    def forget(self, block: int) -> None:
        """Drop the block's entry: its content is about to change, or must not be shared."""
        entry = self._entries.pop(block, None)
        if entry is None:
            return
        if entry.hash is not None:
            del self._by_hash[entry.hash]
            recorder, is_followed = self.recorder, is_first_group(entry.hash)
            if recorder is not None and is_followed and not self.is_kept(entry.hash):
                recorder.removed(entry.hash)
        key = (entry.parent, entry.token_ids[0])
        siblings = self._siblings[key]
        del siblings[block]
        if not siblings:
            del self._siblings[key]
        if self._latest.get(entry.parent) == block:
            del self._latest[entry.parent]

    def _insert(self, block: int, entry: _Entry) -> None:
        self._entries[block] = entry
        self._siblings.setdefault((entry.parent, entry.token_ids[0]), {})[block] = None
        self._latest[entry.parent] = block

    def check_integrity(self) -> None:
        """Assert that the three maps agree."""
        num_siblings = 0
        for (parent, first), siblings in self._siblings.items():
            assert siblings, "an empty sibling set was kept"
            num_siblings += len(siblings)
            for block in siblings:
                entry = self._entries[block]
                assert entry.parent == parent and entry.tokens()[0] == first, block
        assert num_siblings == len(self._entries), "an entry is missing from its siblings"
        for parent, block in self._latest.items():
            assert self._entries[block].parent == parent, block
        for own_hash, block in self._by_hash.items():
            entry = self._entries[block]
            group = own_hash[HASH_BYTES:]
            assert entry.hash == own_hash and entry.parent[HASH_BYTES:] == group, block
            before = entry.parent[:HASH_BYTES]
            assert own_hash[:HASH_BYTES] == hash_block(before, entry.tokens()), block


def _common_prefix(first: list[int], second: list[int]) -> int:
    """Return how many leading elements are equal."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
