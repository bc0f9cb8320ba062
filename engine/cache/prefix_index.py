"""Which block holds the K/V of which tokens, found by the tokens before it.

A block is reached through its *parent hash*: the chained hash of all tokens before it (and of the
cache salt, which seeds the chain), so equal keys mean an equal whole prefix.

    root ──▶ [t0 … t15] ──▶ [t16 … t31] ──▶ [t32 t33 t34]        full, full, partial
                        └─▶ [t16 … t24 u9 …]                      a sibling

Full blocks are found by their own hash in one look-up. Where the chain of full blocks ends, the
successor that shares the longest prefix with the wanted tokens is found among the siblings, full
or partial: its first tokens can be copied, so sharing is exact to the token. The idea of hashed
chains is vLLM's automatic prefix caching; of token-granular matches, SGLang's RadixAttention.
"""

from __future__ import annotations

from array import array
from hashlib import sha256
from typing import NamedTuple

from ..sequence import Sequence

MAX_SIBLINGS = 32  # newest first; bounds the search where thousands of prompts start alike


def root_hash(cache_salt: str | None) -> bytes:
    """Start of a chain; requests of different salts never share a block."""
    return sha256(b"" if cache_salt is None else b"salt:" + cache_salt.encode()).digest()


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """SHA-256 of a full block: collisions would serve one client another's prompt."""
    return sha256(parent + array("I", token_ids).tobytes()).digest()


class _Entry:
    """What a block holds. While its sequence still writes it, the tokens are read from there."""

    __slots__ = ("hash", "owner", "parent", "start", "token_ids")

    def __init__(self, parent: bytes, token_ids: list[int], own_hash: bytes | None) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.hash = own_hash
        self.owner: Sequence | None = None
        self.start = 0

    def tokens(self) -> list[int]:
        owner = self.owner
        if owner is None:
            return self.token_ids
        return owner.token_ids[self.start : owner.num_computed_tokens]


class Successor(NamedTuple):
    """`block` holds the wanted tokens in its first `num_tokens` slots."""

    block: int
    num_tokens: int


class PrefixIndex:
    """Invariant: a block has at most one entry, and its K/V is that of the entry's tokens."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._by_hash: dict[bytes, int] = {}
        self._siblings: dict[tuple[bytes, int], dict[int, None]] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, own_hash: bytes) -> int | None:
        """The block whose full content and whole prefix hash to `own_hash`."""
        return self._by_hash.get(own_hash)

    def find_successor(self, parent: bytes, wanted: list[int]) -> Successor | None:
        """The block after `parent` that shares most leading tokens with `wanted`, at least one."""
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

    def add_full(self, block: int, parent: bytes, own_hash: bytes, token_ids: list[int]) -> None:
        """Index a full block, unless another already stands for the same content."""
        entry = self._entries.get(block)
        if own_hash in self._by_hash:
            self.forget(block)
        elif entry is not None and entry.owner is not None:  # it stands where it belongs
            entry.token_ids, entry.hash, entry.owner = token_ids, own_hash, None
            self._by_hash[own_hash] = block
        else:
            self.forget(block)
            self._by_hash[own_hash] = block
            self._insert(block, _Entry(parent, token_ids, own_hash))

    def add_live(self, block: int, parent: bytes, owner: Sequence, start: int) -> None:
        """Index the block that `owner` is filling; `start` is its first token's position."""
        self.forget(block)
        entry = _Entry(parent, owner.token_ids[start : start + 1], None)
        entry.owner, entry.start = owner, start
        self._insert(block, entry)

    def freeze(self, block: int, owner: Sequence) -> None:
        """`owner` lets go of the block: keep what it had computed so far."""
        entry = self._entries.get(block)
        if entry is not None and entry.owner is owner:
            entry.token_ids = entry.tokens()
            entry.owner = None

    def forget(self, block: int) -> None:
        """The block's content is about to change, or must not be shared."""
        entry = self._entries.pop(block, None)
        if entry is None:
            return
        if entry.hash is not None:
            del self._by_hash[entry.hash]
        key = (entry.parent, entry.token_ids[0])
        siblings = self._siblings[key]
        del siblings[block]
        if not siblings:
            del self._siblings[key]

    def _insert(self, block: int, entry: _Entry) -> None:
        self._entries[block] = entry
        self._siblings.setdefault((entry.parent, entry.token_ids[0]), {})[block] = None

    def check_integrity(self) -> None:
        """Prove the three maps against each other; AssertionError names what is wrong."""
        num_siblings = 0
        for (parent, first), siblings in self._siblings.items():
            assert siblings, "an empty sibling set was kept"
            num_siblings += len(siblings)
            for block in siblings:
                entry = self._entries[block]
                assert entry.parent == parent and entry.tokens()[0] == first, block
        assert num_siblings == len(self._entries), "an entry is missing from its siblings"
        for own_hash, block in self._by_hash.items():
            entry = self._entries[block]
            assert entry.hash == own_hash == hash_block(entry.parent, entry.tokens()), block


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
