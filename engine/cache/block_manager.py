"""Block tables: prefix matches, slots for new tokens, copy-on-write forks, freeing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

from ..sequence import Sequence
from ..step import BlockCopy
from .block_pool import BlockPool
from .prefix_index import Successor, hash_block, root_hash

NEVER = sys.maxsize


class PrefixMatch(NamedTuple):
    """What of a sequence's tokens is already cached: `blocks` whole, then the first tokens of
    `successor`, whose block must be copied since the sequence will write behind them."""

    blocks: list[int]
    successor: Successor | None
    num_tokens: int

    def whole_blocks(self) -> PrefixMatch:
        """The match without its copy, which needs a block more while the step lasts."""
        copied = self.successor.num_tokens if self.successor else 0
        return PrefixMatch(self.blocks, None, self.num_tokens - copied)


NO_MATCH = PrefixMatch([], None, 0)


class BlockManager:
    """Gives sequences their blocks. A failed allocation changes nothing.

    A shared block is never written: before a sequence writes into a block of which it is not the
    only holder, it gets a copy. The worker does a step's copies before anything else, all at
    once; so the source of a copy stays referenced until `end_step`, lest it become another
    copy's destination in the same step.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks_copied = 0
        self.blocks_shared = 0
        self._copy_sources: list[int] = []
        self._roots: dict[str | None, bytes] = {}

    @property
    def usage(self) -> float:
        """Share of the pool's blocks that sequences hold, 0 to 1."""
        return 1.0 - self.pool.num_free / self.pool.num_blocks

    # -- prefix sharing --------------------------------------------------------------------

    def match_prefix(self, sequence: Sequence, max_tokens: int) -> PrefixMatch:
        """The longest cached prefix of at most `max_tokens` tokens; takes nothing yet.

        The caller leaves at least one token to compute, or there would be nothing to sample from.
        """
        if not self.enable_prefix_caching:
            return NO_MATCH
        size = self.block_size
        blocks: list[int] = []
        for i in range(max_tokens // size):
            block = self.pool.lookup(self._block_hash(sequence, i))
            if block is None:
                break
            blocks.append(block)
        start = len(blocks) * size
        wanted = sequence.token_ids[start : min(start + size, max_tokens)]
        parent = self._parent_hash(sequence, len(blocks))
        successor = self.pool.index.find_successor(parent, wanted)
        if successor is None:
            return PrefixMatch(blocks, None, start)
        return PrefixMatch(blocks, successor, start + successor.num_tokens)

    def commit_full_blocks(self, sequence: Sequence) -> None:
        """Index what was computed since the last call: full blocks, and the tail while it grows.

        Worth calling only once `num_computed_tokens` has reached `sequence.commit_at`.
        """
        if not self.enable_prefix_caching:
            sequence.commit_at = NEVER
            return
        size, table = self.block_size, sequence.block_table
        first, full = (sequence.commit_at - 1) // size, sequence.num_computed_tokens // size
        for i in range(first, full):
            self.pool.index.add_full(
                table[i],
                self._parent_hash(sequence, i),
                self._block_hash(sequence, i),
                sequence.token_ids[i * size : (i + 1) * size],
            )
        if sequence.num_computed_tokens > full * size:
            block = table[full]
            if block not in self.pool.index:
                parent = self._parent_hash(sequence, full)
                self.pool.index.add_live(block, parent, sequence, full * size)
            sequence.commit_at = (full + 1) * size
        else:
            sequence.commit_at = full * size + 1

    # -- slots -----------------------------------------------------------------------------

    def allocate_slots(
        self, sequence: Sequence, num_new_tokens: int, match: PrefixMatch = NO_MATCH
    ) -> list[BlockCopy] | None:
        """Make room for `num_new_tokens` behind those computed or in flight (behind `match`, for a
        sequence that holds no blocks yet, whose `num_computed_tokens` it sets).

        Returns the copies that the step must do first; None if the pool cannot give the blocks.
        """
        size, pool = self.block_size, self.pool
        table = sequence.block_table
        computed = sequence.num_computed_tokens + sequence.num_in_flight or match.num_tokens
        num_held = len(table) + len(match.blocks)
        num_missing = -(-(computed + num_new_tokens) // size) - num_held
        tail = computed // size
        copy_on_write = tail < len(table) and self._is_shared(table[tail])
        revived = [block for block in match.blocks if pool.ref_counts[block] == 0]
        num_taken = len(revived) + max(num_missing, 0) + copy_on_write
        successor = match.successor
        if successor is not None and pool.ref_counts[successor.block] == 0:
            num_taken += 1  # the copy's source must not be handed out in this step
        if num_taken > pool.num_free:
            return None
        for block in match.blocks:
            pool.share(block)
        self.blocks_shared += len(match.blocks)
        table.extend(match.blocks)
        copies = [self._copy_on_write(sequence, tail)] if copy_on_write else []
        if successor is not None:
            pool.share(successor.block)  # before a new block could take its place
        for _ in range(num_missing):
            fresh = pool.allocate()
            assert fresh is not None
            table.append(fresh)
        if successor is not None:
            copies.append(self._record_copy(successor.block, table[len(match.blocks)]))
        if match.num_tokens:
            sequence.num_computed_tokens = computed
            sequence.commit_at = computed + 1
        return copies

    def _is_shared(self, block: int) -> bool:
        """Held by another sequence. The references of this step's copies do not count: the step
        reads their sources before it writes."""
        count = self.pool.ref_counts[block]
        return count > 1 and count - self._copy_sources.count(block) > 1

    def _copy_on_write(self, sequence: Sequence, position: int) -> BlockCopy:
        """Replace the shared block at `position` of the table; its reference passes to the copy."""
        source = sequence.block_table[position]
        destination = self.pool.allocate()
        assert destination is not None
        self.pool.index.freeze(source, sequence)
        sequence.block_table[position] = destination
        return self._record_copy(source, destination)

    def _record_copy(self, source: int, destination: int) -> BlockCopy:
        """The caller holds a reference to `source`, which `end_step` gives back."""
        self._copy_sources.append(source)
        self.blocks_copied += 1
        return BlockCopy(source, destination)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` continues from what `parent` has computed, sharing all of its blocks. Behind
        that, their tokens may differ."""
        assert not child.block_table
        for block in parent.block_table:
            self.pool.share(block)
        self.blocks_shared += len(parent.block_table)
        child.block_table = list(parent.block_table)
        child.block_hashes = parent.block_hashes[: parent.num_computed_tokens // self.block_size]
        child.num_computed_tokens = parent.num_computed_tokens
        child.commit_at = parent.commit_at

    def free(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        """Give all blocks back, tail first, so that prefixes outlive tails in the cache.

        `poisoned` K/V (from a row whose logits were not finite) becomes unfindable as well. Steps
        in flight may still write to the blocks: whoever gets them does so in a later step.
        """
        pool, table = self.pool, sequence.block_table
        for block in reversed(table):
            if poisoned:
                pool.forget(block)
            else:
                pool.index.freeze(block, sequence)
            pool.release(block)
        table.clear()
        sequence.num_computed_tokens = sequence.num_in_flight = 0
        sequence.commit_at = 1

    def end_step(self) -> None:
        """The step's copies have been handed to the worker: their sources may be reused."""
        for block in self._copy_sources:
            self.pool.release(block)
        self._copy_sources.clear()

    # -- hashes ----------------------------------------------------------------------------

    def _parent_hash(self, sequence: Sequence, i: int) -> bytes:
        if i:
            return self._block_hash(sequence, i - 1)
        salt = sequence.request.cache_salt
        root = self._roots.get(salt)
        if root is None:
            if len(self._roots) > 4096:  # salts come from clients; hashing one again is cheap
                self._roots.clear()
            root = self._roots[salt] = root_hash(salt)
        return root

    def _block_hash(self, sequence: Sequence, i: int) -> bytes:
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) <= i:
            k = len(hashes)
            parent = hashes[-1] if hashes else self._parent_hash(sequence, 0)
            hashes.append(hash_block(parent, sequence.token_ids[k * size : (k + 1) * size]))
        return hashes[i]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Prove pool, tables and index against each other, given every sequence with blocks."""
        expected = [0] * self.pool.num_blocks
        for source in self._copy_sources:
            expected[source] += 1
        for sequence in sequences:
            table = sequence.block_table
            assert len(set(table)) == len(table), f"{sequence} holds a block twice"
            assert sequence.num_computed_tokens <= len(sequence.token_ids), sequence
            scheduled = sequence.num_computed_tokens + sequence.num_in_flight
            assert scheduled <= len(table) * self.block_size, sequence
            for block in table:
                expected[block] += 1
        self.pool.check_integrity(expected)
