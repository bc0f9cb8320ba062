"""Block tables for several groups of layers, some of which need only the last tokens.

Every group of layers (engine/layers) has a table of its own for each sequence, all with the same
number of columns, over one pool. A windowed group gives a block back as soon as all tokens that
attend to it are computed, and its column then holds the null block, which is no block of the pool
and is never written:

    full group      b0  b1  b2  b3  b4  b5          a sequence of 90 tokens, blocks of 16,
    window of 32    –   –   –   c3  c4  c5          whose last tokens attend to b0 … and c3 …

Blocks that were given back can be found by their hashes until they are used for something else.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable

from ..layers.layer_groups import first_needed
from ..sequence import Sequence
from ..step import BlockCopy, TableChange
from .block_hashes import HasBlock, WantedBlock, of_group
from .block_manager import NO_MATCH, BlockManager, PrefixMatch
from .prefix_index import Successor
from .state_slots import StateSlots


def make_block_manager(
    num_blocks: int,
    block_size: int,
    windows: abc.Sequence[int | None] = (None,),
    *,
    enable_prefix_caching: bool = True,
    states: StateSlots | None = None,
) -> BlockManager:
    """Make the block manager for groups of layers with these windows. Models with `states` have
    one group, without a window."""
    if tuple(windows) == (None,):
        return BlockManager(
            num_blocks, block_size, enable_prefix_caching=enable_prefix_caching, states=states
        )
    assert states is None
    return GroupedBlockManager(
        num_blocks, block_size, windows, enable_prefix_caching=enable_prefix_caching
    )


class GroupedBlockManager(BlockManager):
    """A block manager with a table for each group; see BlockManager for what is the same.

    All tables of a sequence grow, are shared and are copied together. So if the block that it
    writes next is its own in the first group, it is in all.
    """

    has_groups = True

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        windows: abc.Sequence[int | None],
        *,
        enable_prefix_caching: bool = True,
    ) -> None:
        """`windows` are those of the groups; a full group is the first."""
        super().__init__(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.num_groups = len(windows)
        self.null_block = num_blocks
        """The id that stands for blocks before a window."""
        self._windows = tuple(windows)
        self._windowed = [(g, window) for g, window in enumerate(windows) if window is not None]
        self._released: list[tuple[Sequence, TableChange]] = []

    # -- prefix sharing --------------------------------------------------------------------

    def match_prefix(self, sequence: Sequence, max_tokens: int) -> PrefixMatch:
        """Find a cached prefix of at most `max_tokens` tokens, without taking it: the longest of
        whole blocks, and what of one more block all groups have.

        A full group must have all of its blocks, a windowed one those that the next token's window
        reaches.
        """
        if not self.enable_prefix_caching:
            return NO_MATCH
        size, lookup = self.block_size, self.pool.lookup
        end = self.find_end(sequence, max_tokens // size, lambda own: lookup(own) is not None)
        # 1. The whole blocks.
        groups = range(self.num_groups)
        blocks = [self._find_blocks(sequence, g, end) for g in groups]
        # 2. As much as all groups have of the block after them.
        start = end * size
        wanted = sequence.token_ids[start : min(start + size, max_tokens)]
        parent, find = self._parent_hash(sequence, end), self.pool.index.find_successor
        found: list[Successor] = []
        for g in groups:
            successor = find(of_group(parent, g), wanted)
            if successor is None:
                break
            found.append(successor)
        successors: list[Successor | None] = [None] * self.num_groups
        length = start
        if len(found) == self.num_groups:
            common = min(one.num_tokens for one in found)
            successors = [Successor(one.block, common) for one in found]
            length += common
        first, *others = (PrefixMatch(blocks[g], successors[g], length) for g in groups)
        return first._replace(others=tuple(others))

    def find_end(self, sequence: Sequence, most: int, has: HasBlock) -> int:
        """Return the largest number of whole blocks, at most `most`, that a match may take in all
        groups if it can have the blocks that `has` says."""
        # 1. Full groups must have every block.
        for g, window in enumerate(self._windows):
            if window is None:
                end = 0
                while end < most and has(self._hash_in(sequence, end, g)):
                    end += 1
                most = end
        # 2. Windows must have their last blocks. If one lacks block i, the match ends there at the
        #    latest: every end that lies between needs the block, too.
        end = most
        while end and (missing := self._last_missing(sequence, end, has)) is not None:
            end = missing
        return end

    def _last_missing(self, sequence: Sequence, end: int, has: HasBlock) -> int | None:
        """Return the last of the blocks before block `end` that some window needs and lacks."""
        size = self.block_size
        firsts = [(g, first_needed(window, end * size, size)) for g, window in self._windowed]
        for i in range(end - 1, min((first for _, first in firsts), default=end) - 1, -1):
            for g, first in firsts:
                if i >= first and not has(self._hash_in(sequence, i, g)):
                    return i
        return None

    def wanted_blocks(self, sequence: Sequence, end: int) -> list[WantedBlock]:
        firsts = [self._first_column(group, end) for group in range(self.num_groups)]
        return [
            block
            for i in range(min(firsts), end)
            for block, first in zip(self.column(sequence, i), firsts, strict=True)
            if i >= first
        ]

    def column(self, sequence: Sequence, i: int) -> list[WantedBlock]:
        parent, own_hash = self._parent_hash(sequence, i), self._block_hash(sequence, i)
        groups = range(self.num_groups)
        return [WantedBlock(i, of_group(parent, g), of_group(own_hash, g)) for g in groups]

    def _first_column(self, group: int, end: int) -> int:
        """Return the first column of a group's table that a match of `end` blocks needs."""
        window = self._windows[group]
        if window is None:
            return 0
        return min(first_needed(window, end * self.block_size, self.block_size), end)

    def _find_blocks(self, sequence: Sequence, group: int, end: int) -> list[int]:
        """Return a group's table of the first `end` blocks, which are known to be there."""
        first = self._first_column(group, end)
        table = [self.null_block] * first
        for i in range(first, end):
            block = self.pool.lookup(self._hash_in(sequence, i, group))
            assert block is not None
            table.append(block)
        return table

    def _hash_in(self, sequence: Sequence, i: int, group: int) -> bytes:
        return of_group(self._block_hash(sequence, i), group)

    def commit_full_blocks(self, sequence: Sequence) -> None:
        """Index the blocks computed since the last call, then give back those behind windows.

        The call has an effect only once `num_computed_tokens` has reached `sequence.commit_at`,
        which it moves to where the next one is due: a block further, at the latest.
        """
        size, computed = self.block_size, sequence.num_computed_tokens
        first, full = (sequence.commit_at - 1) // size, computed // size
        if self.enable_prefix_caching:
            for i in range(first, full):
                self._index_full(sequence, i)
            if computed > full * size:
                self._index_live(sequence, full)
        is_open = computed > full * size or not self.enable_prefix_caching
        sequence.commit_at = (full + 1) * size if is_open else full * size + 1
        for g, window in self._windowed:
            end = first_needed(window, computed, size)
            if end:
                self._release_before(sequence, g, end)

    def _index_full(self, sequence: Sequence, i: int) -> None:
        size, index = self.block_size, self.pool.index
        parent, own_hash = self._parent_hash(sequence, i), self._block_hash(sequence, i)
        token_ids = sequence.token_ids[i * size : (i + 1) * size]
        for g, table in enumerate(self._tables(sequence)):
            is_new = index.add_full(table[i], of_group(parent, g), of_group(own_hash, g), token_ids)
            if g == 0 and is_new and index.recorder is not None:
                request = sequence.request
                before = parent if i else None
                index.recorder.stored(
                    own_hash, before, token_ids, request.adapter, request.cache_salt
                )

    def _index_live(self, sequence: Sequence, i: int) -> None:
        index = self.pool.index
        parent = self._parent_hash(sequence, i)
        for g, table in enumerate(self._tables(sequence)):
            if table[i] not in index:
                index.add_live(table[i], of_group(parent, g), sequence, i * self.block_size)

    def _release_before(self, sequence: Sequence, group: int, end: int) -> None:
        """Give back a group's blocks before block `end`, the first one first: it is the oldest."""
        table, null, pool = self._tables(sequence)[group], self.null_block, self.pool
        start = end
        while start and table[start - 1] != null:
            start -= 1
        if start == end:
            return
        for i in range(start, end):
            pool.release(table[i])
            table[i] = null
        change = TableChange(sequence.seq_id, start, [null] * (end - start), group)
        self._released.append((sequence, change))

    def take_window_changes(self) -> list[tuple[Sequence, TableChange]]:
        """Return the changes of tables by blocks that were given back behind windows since this
        was last called. Some sequences may have left, or have other tables by now."""
        released, self._released = self._released, []
        return released

    # -- slots -----------------------------------------------------------------------------

    def _tables(self, sequence: Sequence) -> list[list[int]]:
        if not sequence.other_tables:
            sequence.other_tables = [[] for _ in range(self.num_groups - 1)]
        return [sequence.block_table, *sequence.other_tables]

    def allocate_slots(
        self, sequence: Sequence, num_new_tokens: int, match: PrefixMatch = NO_MATCH
    ) -> list[BlockCopy] | None:
        """Make room for `num_new_tokens` after the tokens that are computed or in flight, in all
        groups or, if the pool has too few free blocks, in none: see `BlockManager`."""
        # 1. Count the free blocks that this takes, as BlockManager does, in each group.
        size, pool, null = self.block_size, self.pool, self.null_block
        tables = self._tables(sequence)
        matches = (match, *(match.others or (NO_MATCH,) * (self.num_groups - 1)))
        computed = sequence.num_computed_tokens + sequence.num_in_flight or match.num_tokens
        num_missing = -(-(computed + num_new_tokens) // size) - len(tables[0]) - len(match.blocks)
        tail = computed // size
        shared = [tail < len(table) and self._is_shared(table[tail]) for table in tables]
        num_taken = len(tables) * max(num_missing, 0) + sum(shared)
        for found in matches:
            held = [block for block in found.blocks if block != null]
            if found.successor is not None:
                held.append(found.successor.block)
            num_taken += sum(pool.ref_counts[block] == 0 for block in held)
        if num_taken > pool.num_free:
            return None
        # 2. Take them: in all groups shared blocks before new ones, so that no new block replaces
        #    a shared one.
        for table, found in zip(tables, matches, strict=True):
            for block in found.blocks:
                if block != null:
                    pool.share(block)
                    self.blocks_shared += 1
            table.extend(found.blocks)
            if found.successor is not None:
                pool.share(found.successor.block)
        copies = []
        for table, found, is_shared in zip(tables, matches, shared, strict=True):
            if is_shared:
                copies.append(self._copy_on_write(sequence, table, tail))
            for _ in range(num_missing):
                fresh = pool.allocate()
                assert fresh is not None
                table.append(fresh)
            if found.successor is not None:
                copies.append(self._record_copy(found.successor.block, table[len(found.blocks)]))
        if match.num_tokens:
            sequence.num_computed_tokens = computed
            sequence.commit_at = computed + 1
        return copies

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` continue from the tokens that `parent` has computed, sharing its blocks."""
        assert not child.block_table
        tables = [list(table) for table in self._tables(parent)]
        for table in tables:
            for block in table:
                if block != self.null_block:
                    self.pool.share(block)
                    self.blocks_shared += 1
        child.block_table, *child.other_tables = tables
        child.block_hashes = parent.block_hashes[: parent.num_computed_tokens // self.block_size]
        child.num_computed_tokens = parent.num_computed_tokens
        child.commit_at = parent.commit_at

    def free(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        """Release all blocks of the sequence, the last first: see `BlockManager`."""
        pool = self.pool
        if poisoned and pool.evicted_blocks is not None:
            hashes, groups = sequence.block_hashes, range(self.num_groups)
            pool.evicted_blocks.discard([of_group(one, g) for one in hashes for g in groups])
        for table in reversed(self._tables(sequence)):
            for block in reversed(table):
                if block == self.null_block:
                    continue
                if poisoned:
                    pool.forget(block)
                else:
                    pool.index.freeze(block, sequence)
                pool.release(block)
            table.clear()
        if poisoned:  # also what it has given back
            for g, _ in self._windowed:
                for own_hash in sequence.block_hashes:
                    known = pool.lookup(of_group(own_hash, g))
                    if known is not None:
                        pool.forget(known)
        sequence.num_computed_tokens = sequence.num_in_flight = 0
        sequence.commit_at = 1

    def held_blocks(self, sequence: Sequence) -> list[int]:
        columns = zip(*self._tables(sequence), strict=True)
        return [block for column in columns for block in column if block != self.null_block]

    def changes_from(self, sequence: Sequence, start: int) -> list[TableChange]:
        return [
            TableChange(sequence.seq_id, start, table[start:], g)
            for g, table in enumerate(self._tables(sequence))
        ]

    # -- integrity -------------------------------------------------------------------------

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that pool, tables and index agree, and that no windowed table holds a block that
        its window has left behind. `sequences` are all that hold blocks."""
        expected = [0] * self.pool.num_blocks
        size, null = self.block_size, self.null_block
        for source in self._copy_sources:
            expected[source] += 1
        for sequence in sequences:
            tables = self._tables(sequence)
            computed = sequence.num_computed_tokens
            assert computed <= len(sequence.token_ids), sequence
            assert len({len(table) for table in tables}) == 1, f"{sequence}: tables differ"
            assert computed + sequence.num_in_flight <= len(tables[0]) * size, sequence
            held = [block for table in tables for block in table if block != null]
            assert len(set(held)) == len(held), f"{sequence} holds a block twice"
            for block in held:
                expected[block] += 1
            self._check_windows(sequence, tables)
        self.pool.check_integrity(expected)

    def _check_windows(self, sequence: Sequence, tables: list[list[int]]) -> None:
        size, computed = self.block_size, sequence.num_computed_tokens
        # Blocks are given back whenever one is filled, or after a chunk.
        settled = computed // size * size
        for window, table in zip(self._windows, tables, strict=True):
            nulls = sum(block == self.null_block for block in table)
            assert self.null_block not in table[nulls:], f"{sequence} has a gap"
            if window is None:
                assert nulls == 0, f"{sequence} lacks a block of a full group"
            else:
                assert nulls <= first_needed(window, computed, size), f"{sequence} lacks a block"
                assert nulls >= first_needed(window, settled, size), f"{sequence} keeps blocks"
        tail = (computed + sequence.num_in_flight) // size
        if tail < len(tables[0]):
            shared = {self._is_shared(table[tail]) for table in tables}
            assert len(shared) == 1, f"{sequence} shares its tail in some groups only"
