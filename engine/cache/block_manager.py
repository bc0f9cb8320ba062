"""Block tables: prefix matches, slots for new tokens, copy-on-write forks, freeing.

A sequence's block table lists the blocks that hold its K/V: its token i has slot `i % block_size`
of block `table[i // block_size]`. Tables share blocks where their tokens begin alike.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from typing import NamedTuple

from ..events.block_events import BlockEvent
from ..sequence import Sequence
from ..step import BlockCopy, TableChange
from .block_hashes import HasBlock, WantedBlock, extend_hashes, is_first_group, root_hash
from .block_pool import BlockPool
from .block_recorder import BlockRecorder
from .prefix_index import Successor
from .state_slots import StateSlots

NEVER = sys.maxsize
"""A `commit_at` that no sequence reaches."""
MAX_ROOTS = 4096
"""Root hashes to keep. Cache salts come from clients, so their number has no bound."""


class PrefixMatch(NamedTuple):
    """The cached prefix of a sequence's tokens, `num_tokens` long.

    It consists of all tokens of `blocks`, and then the first tokens of the block of `successor`.
    That block must be copied, because the sequence will write its own tokens after them.
    """

    blocks: list[int]
    successor: Successor | None
    num_tokens: int
    others: tuple[PrefixMatch, ...] = ()
    """The same tokens in the other groups of layers, if there are any."""

    def whole_blocks(self) -> PrefixMatch:
        """Return the match without the copy, which holds one more block until the step's end."""
        num_tokens = self.num_tokens - (self.successor.num_tokens if self.successor else 0)
        others = tuple(PrefixMatch(one.blocks, None, num_tokens) for one in self.others)
        return PrefixMatch(self.blocks, None, num_tokens, others)


NO_MATCH = PrefixMatch([], None, 0)
"""Nothing is cached."""


class BlockManager:
    """Gives sequences their blocks. A failed allocation changes nothing.

    A shared block is never written: before a sequence writes into a block that others hold too, it
    gets a copy of its own (copy-on-write). The worker makes all of a step's copies at once, before
    anything else. Therefore the source of a copy stays referenced until `end_step`; otherwise it
    could become the destination of another copy in the same step.

    All layers share one table here. `GroupedBlockManager` has several.
    """

    num_groups = 1
    """Number of groups of layers, each of which has block tables of its own."""
    has_groups = False
    """Whether there are several groups, or one that keeps only the last tokens."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        states: StateSlots | None = None,
    ) -> None:
        """`states` are the state slots of sequences, if the model has layers that keep a state."""
        self.states = states
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks_copied = 0
        self.blocks_shared = 0
        self._copy_sources: list[int] = []
        self._roots: dict[tuple[str | None, str | None], bytes] = {}

    # -- prefix sharing --------------------------------------------------------------------

    def match_prefix(self, sequence: Sequence, max_tokens: int) -> PrefixMatch:
        """Find the longest cached prefix of at most `max_tokens` tokens, without taking it.

        The caller leaves at least one token to compute: without one there would be no logits to
        sample from.
        """
        if not self.enable_prefix_caching:
            return NO_MATCH
        size = self.block_size
        # 1. Full blocks, each found by the hash of its tokens and of all tokens before them.
        blocks: list[int] = []
        for i in range(max_tokens // size):
            block = self.pool.lookup(self._block_hash(sequence, i))
            if block is None:
                break
            blocks.append(block)
        if self.states is not None:
            return self._cut_to_state(sequence, blocks, self.states)
        # 2. The block that shares the most tokens after those, as far as it does.
        start = len(blocks) * size
        wanted = sequence.token_ids[start : min(start + size, max_tokens)]
        parent = self._parent_hash(sequence, len(blocks))
        successor = self.pool.index.find_successor(parent, wanted)
        if successor is None:
            return PrefixMatch(blocks, None, start)
        return PrefixMatch(blocks, successor, start + successor.num_tokens)

    def _cut_to_state(
        self, sequence: Sequence, blocks: list[int], states: StateSlots
    ) -> PrefixMatch:
        """Return the match of those of a sequence's cached blocks up to whose end there is a
        snapshot of the state, and mark the end of all of them for another one."""
        usable = states.count_usable(sequence.block_hashes[: len(blocks)])
        sequence.state_mark = len(blocks) * self.block_size if usable < len(blocks) else 0
        return PrefixMatch(blocks[:usable], None, usable * self.block_size)

    def find_end(self, sequence: Sequence, most: int, has: HasBlock) -> int:
        """Return the largest number of whole blocks, at most `most`, that a match may take if it
        can have the blocks that `has` says."""
        end = 0
        while end < most and has(self._block_hash(sequence, end)):
            end += 1
        return end

    def wanted_blocks(self, sequence: Sequence, end: int) -> list[WantedBlock]:
        """Return the blocks that a match of `end` whole blocks takes, in the order of columns."""
        return [block for i in range(end) for block in self.column(sequence, i)]

    def column(self, sequence: Sequence, i: int) -> list[WantedBlock]:
        """Return the full blocks of column i of a sequence's tables, one for each group."""
        return [WantedBlock(i, self._parent_hash(sequence, i), self._block_hash(sequence, i))]

    def continuation(self, sequence: Sequence, k: int) -> list[int]:
        """Return up to `k` tokens with which another sequence went on after the same tokens and
        the same salt. All tokens of `sequence` are known."""
        if not self.enable_prefix_caching:
            return []
        full = len(sequence.token_ids) // self.block_size
        tail = sequence.token_ids[full * self.block_size :]
        return self.pool.index.continuation(self._parent_hash(sequence, full), tail, k, sequence)

    def commit_full_blocks(self, sequence: Sequence) -> None:
        """Index the blocks computed since the last call: the full ones, and the growing tail.

        The call has an effect only once `num_computed_tokens` has reached `sequence.commit_at`,
        which it moves to where the next one is due.
        """
        if not self.enable_prefix_caching:
            sequence.commit_at = NEVER
            return
        size, table = self.block_size, sequence.block_table
        first, full = (sequence.commit_at - 1) // size, sequence.num_computed_tokens // size
        recorder = self.pool.index.recorder
        for i in range(first, full):
            parent, own_hash = self._parent_hash(sequence, i), self._block_hash(sequence, i)
            token_ids = sequence.token_ids[i * size : (i + 1) * size]
            is_new = self.pool.index.add_full(table[i], parent, own_hash, token_ids)
            if is_new and recorder is not None:
                request = sequence.request
                before = parent if i else None
                recorder.stored(own_hash, before, token_ids, request.adapter, request.cache_salt)
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
        """Make room for `num_new_tokens` after the tokens that are computed or in flight.

        A sequence that holds no blocks yet starts with those of `match`, which become its computed
        tokens. Returns the copies that the step must make first, or None if the pool has too few
        free blocks.
        """
        # 1. Count the free blocks that this takes: the cached ones that become used again, new
        # ones, a copy of the shared block that the first new token is written to, and the source of
        # the successor's copy, which must not be handed out in this step.
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
            num_taken += 1
        if num_taken > pool.num_free:
            return None
        # 2. Take them: shared blocks before new ones, so that no new block replaces a shared one.
        for block in match.blocks:
            pool.share(block)
        self.blocks_shared += len(match.blocks)
        table.extend(match.blocks)
        copies = [self._copy_on_write(sequence, table, tail)] if copy_on_write else []
        if successor is not None:
            pool.share(successor.block)
        for _ in range(num_missing):
            fresh = pool.allocate()
            assert fresh is not None
            table.append(fresh)
        if successor is not None:
            copies.append(self._record_copy(successor.block, table[len(match.blocks)]))
        if match.num_tokens:
            sequence.num_computed_tokens = computed
            sequence.commit_at = computed + 1
        if self.states is not None and sequence.state_slot < 0:
            last = len(match.blocks) - 1
            self.states.hold(sequence, sequence.block_hashes[last] if match.blocks else None)
        return copies

    def _is_shared(self, block: int) -> bool:
        """Return True if another sequence holds the block.

        References of this step's copies do not count: the step reads their sources before it
        writes to any block.
        """
        count = self.pool.ref_counts[block]
        return count > 1 and count - self._copy_sources.count(block) > 1

    def _copy_on_write(self, sequence: Sequence, table: list[int], position: int) -> BlockCopy:
        """Replace the shared block at `position` of the sequence's table by a copy of its own.

        The sequence's reference to the block passes to the recorded copy.
        """
        source = table[position]
        destination = self.pool.allocate()
        assert destination is not None
        self.pool.index.freeze(source, sequence)
        table[position] = destination
        return self._record_copy(source, destination)

    def _record_copy(self, source: int, destination: int) -> BlockCopy:
        """Record a copy of this step. `end_step` releases the caller's reference to `source`."""
        self._copy_sources.append(source)
        self.blocks_copied += 1
        if self.pool.trace is not None:
            self.pool.trace.copied.add(destination)
        return BlockCopy(source, destination)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` continue from the tokens that `parent` has computed, sharing its blocks.

        Their tokens may differ after the computed ones.
        """
        assert not child.block_table
        for block in parent.block_table:
            self.pool.share(block)
        self.blocks_shared += len(parent.block_table)
        child.block_table = list(parent.block_table)
        child.block_hashes = parent.block_hashes[: parent.num_computed_tokens // self.block_size]
        child.num_computed_tokens = parent.num_computed_tokens
        child.commit_at = parent.commit_at
        if self.states is not None:
            self.states.fork(parent, child)

    def free(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        """Release all blocks of the sequence, the last first: then prefixes outlive tails.

        `poisoned` K/V (from a row whose logits were not finite) is removed from the index as well.
        Steps in flight may still write to the blocks; that is safe, because their next holder
        writes to them in a later step.
        """
        pool, table = self.pool, sequence.block_table
        if poisoned and pool.evicted_blocks is not None:
            pool.evicted_blocks.discard(sequence.block_hashes[: len(table)])
        for block in reversed(table):
            if poisoned:
                pool.forget(block)
            else:
                pool.index.freeze(block, sequence)
            pool.release(block)
        table.clear()
        sequence.num_computed_tokens = sequence.num_in_flight = 0
        sequence.commit_at = 1
        if self.states is not None:
            if poisoned:
                self.states.forget(sequence.block_hashes)
            self.states.release(sequence)

    def held_blocks(self, sequence: Sequence) -> list[int]:
        """Return the blocks that a sequence holds, in the order of its tokens."""
        return list(sequence.block_table)

    def changes_from(self, sequence: Sequence, start: int) -> list[TableChange]:
        """Return what a worker must be told of a sequence's tables from column `start` on."""
        return [TableChange(sequence.seq_id, start, sequence.block_table[start:])]

    def take_window_changes(self) -> list[tuple[Sequence, TableChange]]:
        """Return the changes of tables by blocks that were given back behind windows since this
        was last called: none, because all blocks are kept here."""
        return []

    def end_step(self) -> None:
        """Release the sources of the step's copies; call it when the whole step is planned."""
        for block in self._copy_sources:
            self.pool.release(block)
        self._copy_sources.clear()

    def commit_states(self, step: int, failed: Container[int]) -> None:
        """Make the snapshots that a step has taken findable, but for those of `failed` rows."""
        if self.states is not None:
            self.states.commit(step, failed, self._block_hash)

    def forget_free(self) -> None:
        """Forget the content of every cached block that no sequence holds, and all snapshots."""
        self.pool.forget_free()
        if self.states is not None:
            self.states.forget_all()

    # -- who follows the blocks --------------------------------------------------------------

    def record_blocks(self, on: bool) -> None:
        """Record from now on which blocks become known and are lost, or stop recording."""
        index = self.pool.index
        if on and index.recorder is None:
            index.recorder = BlockRecorder(self.block_size)
        elif not on:
            index.recorder = None

    def take_block_events(self) -> list[BlockEvent]:
        """Return what was recorded since this was last called."""
        recorder = self.pool.index.recorder
        return [] if recorder is None else recorder.take()

    def known_blocks(self) -> list[bytes]:
        """Return the hashes of all full blocks that can be found, here or where evicted ones go."""
        hashes, evicted = self.pool.index.hashes(), self.pool.evicted_blocks
        known = () if evicted is None else filter(is_first_group, evicted.hashes())
        return list(dict.fromkeys([*hashes, *known]))

    # -- hashes ----------------------------------------------------------------------------

    def _parent_hash(self, sequence: Sequence, i: int) -> bytes:
        """Return the hash of all tokens before block i of the sequence."""
        if i:
            return self._block_hash(sequence, i - 1)
        seed = sequence.request.cache_salt, sequence.adapter_key
        root = self._roots.get(seed)
        if root is None:
            if len(self._roots) > MAX_ROOTS:
                self._roots.clear()
            root = self._roots[seed] = root_hash(*seed)
        return root

    def _block_hash(self, sequence: Sequence, i: int) -> bytes:
        """Return the hash of block i of the sequence and of all tokens before it."""
        hashes = sequence.block_hashes
        if len(hashes) <= i:
            root = self._parent_hash(sequence, 0)
            extend_hashes(hashes, root, sequence.token_ids, self.block_size, i + 1)
        return hashes[i]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that pool, tables and index agree. `sequences` are all that hold blocks."""
        sequences = list(sequences)
        if self.states is not None:
            self.states.check_integrity(sequences)
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
